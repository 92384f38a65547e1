package vaulttest

import (
	"fmt"
	"net/http"
	"strings"
	"time"
)

// What a vault does beside its keys' operations: it limits them, and it's shut by
// a firewall or by a failover to another region.

// The service's limits for operations with a key other than creating it, per
// vault, region and 10 seconds (learn.microsoft.com, key-vault/general/service-limits).
// The live service has others for the subscription.
var (
	limitsSoftware = map[int]float64{2048: 4000, 3072: 1000, 4096: 500}
	limitsHSM      = map[int]float64{2048: 2000, 3072: 500, 4096: 250}
	limitsCreate   = map[bool]float64{false: 20, true: 10} // by HSM
)

const limitWindow = 10 * time.Second

// A bucket is what a vault has left to give: 1 is all of a window.
type bucket struct {
	level float64
	at    time.Time
}

// take needs mu. It reports whether a vault serves another request that costs so
// much of a window. Refused requests cost nothing, as the documentation has it.
func (s *Server) take(host string, cost float64) bool {
	if s.opts.Throttle <= 0 || isHSM(host) { // a managed HSM has no limit but its speed
		return true
	}
	now := s.opts.Now()
	b := s.buckets[host]
	if b == nil {
		b = &bucket{level: 1, at: now}
		s.buckets[host] = b
	}
	b.level = min(1, b.level+float64(now.Sub(b.at))/float64(limitWindow))
	b.at = now
	cost /= s.opts.Throttle
	const rounding = 1e-9
	if b.level+rounding < cost {
		return false
	}
	b.level -= cost
	return true
}

// cost of an operation, in windows.
func (s *Server) cost(rt *route, c *call) float64 {
	if rt.name == "create" || rt.name == "rotate" {
		return 1 / limitsCreate[s.opts.HSMKeys]
	}
	bits := 2048
	if k := s.keys[keyID(c.host, c.name)]; k != nil {
		if v := k.version(c.version); v != nil && v.priv != nil {
			bits = v.priv.N.BitLen()
		}
	}
	if s.opts.HSMKeys {
		return 1 / limitsHSM[bits]
	}
	return 1 / limitsSoftware[bits]
}

// SetFirewall shuts a vault, such as "unit.vault.azure.net", to this client, or
// opens it again. To whoever has no token it answers as ever.
func (s *Server) SetFirewall(host string, shut bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shut[strings.ToLower(host)] = shut
}

// SetFailover moves all vaults to the region that stands by, where they are
// read-only, or back. Keys wrap and unwrap there.
func (s *Server) SetFailover(over bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failover = over
}

func (s *Server) region() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failover {
		return "australiasoutheast"
	}
	return "australiaeast"
}

// admit needs mu. It decides whether a vault serves a request at all.
func (s *Server) admit(rt *route, c *call) error {
	if s.shut[c.host] {
		return &apiError{http.StatusForbidden, "Forbidden", "ForbiddenByFirewall",
			"Client address is not authorized and caller is not a trusted service.\r\nClient address: 127.0.0.1\r\nCaller: appid=" + c.identity.ClientID + "\r\n"}
	}
	vault, _, _ := strings.Cut(c.host, ".")
	if !s.allowed(c.identity.ClientID, rt.permission) {
		return &apiError{http.StatusForbidden, "Forbidden", "ForbiddenByRbac", fmt.Sprintf(
			"Caller is not authorized to perform action on resource.\r\nIf role assignments, deny assignments or role definitions were changed recently, please observe propagation time.\r\nCaller: appid=%s;oid=%s;iss=%s\r\nAction: 'Microsoft.KeyVault/vaults/keys/%s'\r\nResource: '/subscriptions/00000000-0000-0000-0000-000000000000/resourcegroups/test/providers/microsoft.keyvault/vaults/%s/keys/%s'\r\nAssignment: (not found)\r\nDenyAssignmentId: null\r\nDecisionReason: 'DeniedWithNoValidRBAC' \r\nVault: %s;location=australiaeast\r\n",
			c.identity.ClientID, c.identity.ObjectID, s.issuer(), rt.action, vault, c.name, vault)}
	}
	if s.failover && rt.changes {
		return &apiError{http.StatusForbidden, "Forbidden", "", "The vault is in read-only mode after a failover; only operations that read or use keys are allowed."}
	}
	if !s.take(c.host, s.cost(rt, c)) {
		return throttled
	}
	return nil
}

// throttled is a 429 as the live service sends it: without Retry-After.
var throttled = &apiError{http.StatusTooManyRequests, "Throttled", "",
	"Request was not processed because too many requests were received. Reason: VaultRequestTypeLimitReached"}

// A grant is the permissions of an identity: new ones count from a time on.
type grant struct {
	old, new map[string]bool
	from     time.Time
}

// allowed needs mu.
func (s *Server) allowed(clientID, permission string) bool {
	g := s.permitted[strings.ToLower(clientID)]
	if s.opts.Now().Before(g.from) {
		return g.old[permission]
	}
	return g.new[permission]
}
