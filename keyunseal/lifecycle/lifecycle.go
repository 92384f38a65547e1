// Package lifecycle is the life of a volume's key as a state machine: when to
// unseal, when to look whether the KEK still may be used, and when the volume
// has to stop because it may not.
//
//	locked → acquiring → verifying → unlocked ⇄ degraded → grace → revoked
//	                         ↑                                        │
//	                         └────────── the key has returned ────────┘
//
// [Machine] is the rules and nothing else: no clock, no goroutine, no
// randomness of its own, no I/O. It's told what happened and when, and says what
// to do next and when. [Runner] drives it with a clock and the callbacks of a
// [Host].
//
// # The rules
//
// An outage is not a revocation. What failed without an authoritative answer
// (network, throttling, faults of the service, of the SDK or of this program) is
// transient: it's tried again for ever and takes nothing away, unless
// [Config.MaxOffline] says so.
//
// A denial is believed when it was confirmed: [Config.Confirmations] times over
// at least [Config.ConfirmSpan], since in a cloud grants take minutes to arrive
// and a key that is being recovered is missing for seconds. A transient failure
// between two denials neither confirms nor clears them; a success clears them, and
// so does a long outage (see [Config]).
// Then the volume goes on until [Config.Grace] has passed since the last
// success, and stops.
//
// Only a success advances the clock that the grace period is counted from.
//
// A volume that has stopped keeps trying, and goes on by itself when the key has
// returned, unless an operator locked it.
package lifecycle

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// A State is how far a volume is, as status shows it.
type State int

const (
	// Locked: there is no key, and nobody tries to get it before the next try
	// that the machine has planned: after an integrity error, or never, if an
	// operator has locked the volume.
	Locked State = iota
	// Acquiring: the volume key is being asked for.
	Acquiring
	// Verifying: it's there, and the header is being checked with it.
	Verifying
	// Unlocked: the volume serves, and the last look at the KEK was good.
	Unlocked
	// Degraded: the volume serves, but the last look at the KEK was not good.
	Degraded
	// Grace: the volume serves, access to the KEK was lost for certain, and the
	// volume will stop when the grace period is over.
	Grace
	// Revoked: access was lost and the volume has stopped as its policy says.
	Revoked
	// Erased: the ways in were destroyed, as an operator has told the server to do;
	// there is nothing to come. A header that is found gone doesn't lead here.
	Erased
)

var stateNames = [...]string{"locked", "acquiring", "verifying", "unlocked", "degraded", "grace", "revoked", "erased"}

func (s State) String() string { return nameOf(s, stateNames[:], "state") }

// MarshalText makes states names in JSON.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (s *State) UnmarshalText(b []byte) error { return unmarshal(s, stateNames[:], b) }

// nameOf is the name in a list of a value of a type, what.
func nameOf[T ~int](v T, names []string, what string) string {
	if int(v) < len(names) && v >= 0 {
		return names[v]
	}
	return fmt.Sprintf("%s %d", what, int(v))
}

// unmarshal finds a name in a list.
func unmarshal[T ~int](v *T, names []string, b []byte) error {
	i := slices.Index(names, string(b))
	if i < 0 {
		return fmt.Errorf("lifecycle: unknown name %.30q", b)
	}
	*v = T(i)
	return nil
}

// Serving tells whether requests are served as ever in this state.
func (s State) Serving() bool { return s == Unlocked || s == Degraded || s == Grace }

// A Policy says what a volume does when access to its KEK was lost.
type Policy int

const (
	// Stop fails requests and wipes the keys.
	Stop Policy = iota
	// ReadOnly refuses writes; the keys stay, as reads need them.
	ReadOnly
	// Freeze lets requests wait and wipes the keys.
	Freeze
	// Warn goes on, and says so.
	Warn
)

var policyNames = [...]string{"stop", "read-only", "freeze", "warn"}

func (p Policy) String() string { return nameOf(p, policyNames[:], "policy") }

// MarshalText makes policies names in JSON.
func (p Policy) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (p *Policy) UnmarshalText(b []byte) error { return unmarshal(p, policyNames[:], b) }

// ParsePolicy returns the policy of a name.
func ParsePolicy(name string) (Policy, error) {
	if i := slices.Index(policyNames[:], name); i >= 0 {
		return Policy(i), nil
	}
	return 0, fmt.Errorf("policy %q is none of %s", name, strings.Join(policyNames[:], ", "))
}

// Wipes tells whether the policy wipes the keys.
func (p Policy) Wipes() bool { return p == Stop || p == Freeze }

// A Kind is what an attempt to use the KEK has shown.
type Kind int

const (
	// Transient: nothing is known; trying again may help. The zero value, so
	// that what nobody has thought of takes nothing away.
	Transient Kind = iota
	// Success: the KEK unwrapped what it should.
	Success
	// Denied: whoever decides has said no.
	Denied
	// Integrity: an answer, a token or the header is not what it should be.
	Integrity
	// Misconfigured: it can't work before a person has changed something here.
	Misconfigured
)

var kindNames = [...]string{"transient", "success", "denied", "integrity", "misconfigured"}

func (k Kind) String() string { return nameOf(k, kindNames[:], "kind") }

// MarshalText makes kinds names in JSON.
func (k Kind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (k *Kind) UnmarshalText(b []byte) error { return unmarshal(k, kindNames[:], b) }

// An Outcome is the result of one attempt.
type Outcome struct {
	Kind Kind

	// Expired says that the KEK has expired. It still unwraps then; a [Host] that
	// takes that for a denial says so.
	Expired bool

	// Answered says that a service answered, with a fault or with "too many
	// requests"; RetryAfter is how long it asked to be left alone.
	Answered   bool
	RetryAfter time.Duration

	// For people: what class of error, the service's code, its id of the
	// request, and the whole story.
	Class, Code, RequestID, Text string
}

// An Action is what the machine wants done.
type Action int

const (
	// Nothing: only a command or the end of what is under way changes anything.
	Nothing Action = iota
	// Unseal: get the volume key, check the header, serve.
	Unseal
	// Probe: look whether the KEK still may be used.
	Probe
	// Rotate: look for a newer version of the KEK, and rewrap if there is one.
	Rotate
	// Halt: stop the volume by its policy.
	Halt
	// Lift: undo a Halt that has left the keys in place.
	Lift
	// GiveUp: end; a person has to change something.
	GiveUp
)

var actionNames = [...]string{"nothing", "unseal", "probe", "rotate", "halt", "lift", "give up"}

func (a Action) String() string { return nameOf(a, actionNames[:], "action") }
