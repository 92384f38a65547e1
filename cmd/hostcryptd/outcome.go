package main

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"time"

	"hostcryptd/keyunseal"
	"hostcryptd/keyunseal/lifecycle"
	"hostcryptd/sector"
)

// outcomeOf says what an error of unsealing means for the life of the key. Of
// several tokens' errors the most hopeful counts: as long as one of them may yet
// open the volume, it's worth trying again, whatever the others say.
func outcomeOf(err error) lifecycle.Outcome {
	if err == nil {
		return lifecycle.Outcome{Kind: lifecycle.Success}
	}
	// What nobody has thought of must not end a boot: a process that could not be
	// started, no descriptor left. What is on the disk is the same at the next try.
	o, _ := knownOutcome(err)
	if ended := errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled); ended && (o.Kind != lifecycle.Transient || o.Class == "") {
		o = lifecycle.Outcome{Class: "no answer"}
	}
	o.Text = err.Error()
	return o
}

// hope ranks failures: a larger one is more hopeful, or as hopeful and says more.
func hope(o lifecycle.Outcome) int {
	rank := 2 * slices.Index([]lifecycle.Kind{lifecycle.Misconfigured, lifecycle.Integrity, lifecycle.Denied, lifecycle.Transient}, o.Kind)
	if o.Class != "" {
		rank++
	}
	return rank
}

// knownOutcome is outcomeOf of errors that something is known of. An error that joins
// others, by [errors.Join], is the errors of several tokens, each with an outcome of its
// own: what isn't known passes there too. One that wraps several is one of all their
// kinds.
func knownOutcome(err error) (o lifecycle.Outcome, known bool) {
	switch err {
	case sector.ErrAuth, sector.ErrNotVolume, sector.ErrDamaged, sector.ErrUnsupported, sector.ErrDevice:
		return lifecycle.Outcome{Kind: lifecycle.Misconfigured}, true
	}
	switch e := err.(type) {
	case *keyunseal.Error:
		return keyOutcome(e), true
	case interface{ Unwrap() error }:
		return knownOutcome(e.Unwrap())
	case interface{ Unwrap() []error }:
		joins := reflect.TypeOf(e) == joined
		if !joins && isReadError(err) {
			return lifecycle.Outcome{}, true
		}
		for _, err := range e.Unwrap() {
			got, ok := knownOutcome(err)
			ok = ok || joins
			if ok && (!known || hope(got) > hope(o)) {
				o, known = got, true
			}
		}
	}
	return o, known
}

// joined is the type of what errors.Join returns.
var joined = reflect.TypeOf(errors.Join(errors.ErrUnsupported))

// keyOutcome is outcomeOf of what keyunseal says.
func keyOutcome(k *keyunseal.Error) lifecycle.Outcome {
	o := lifecycle.Outcome{
		Kind: lifecycle.Misconfigured, Class: k.Class.String(), Code: k.Code, RequestID: k.RequestID,
		Answered: k.Status != 0, RetryAfter: k.RetryAfter,
	}
	switch {
	case k.Transient():
		o.Kind = lifecycle.Transient
	case k.Denied():
		o.Kind = lifecycle.Denied
	case k.Class == keyunseal.ClassIntegrity && k.Op != "token" && k.Op != "unseal":
		o.Kind = lifecycle.Integrity
	}
	if k.Class == keyunseal.ClassIdentity {
		o.RetryAfter = max(o.RetryAfter, time.Second)
	}
	return o
}

// rewrapOutcome says what the exit code of a rewrap that failed means for the
// next: -1 is that of one which could not be started, or was killed.
func rewrapOutcome(code int) lifecycle.Outcome {
	o := lifecycle.Outcome{Kind: lifecycle.Misconfigured, Text: fmt.Sprintf("rewrap ended with %d", code)}
	switch code {
	case codeUnreachable, codeThrottled, codeIdentity, codeBusy, -1:
		o.Kind = lifecycle.Transient
	}
	return o
}
