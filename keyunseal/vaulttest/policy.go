package vaulttest

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// A rotationPolicy says when the service makes a new version by itself, which the
// double doesn't, and when versions expire, which it does.
type rotationPolicy struct {
	ID         string            `json:"id,omitempty"`
	Actions    []lifetimeAction  `json:"lifetimeActions"`
	Attributes *policyAttributes `json:"attributes"`
}

type lifetimeAction struct {
	Trigger struct {
		AfterCreate  string `json:"timeAfterCreate,omitempty"`
		BeforeExpiry string `json:"timeBeforeExpiry,omitempty"`
	} `json:"trigger"`
	Action struct {
		Type string `json:"type"`
	} `json:"action"`
}

type policyAttributes struct {
	ExpiryTime string `json:"expiryTime,omitempty"`
	Created    int64  `json:"created,omitempty"`
	Updated    int64  `json:"updated,omitempty"`
}

var periodPattern = regexp.MustCompile(`^P(?:([0-9]+)Y)?(?:([0-9]+)M)?(?:([0-9]+)D)?$`)

// addPeriod adds an ISO 8601 duration of years, months and days.
func addPeriod(t time.Time, period string) (time.Time, error) {
	m := periodPattern.FindStringSubmatch(period)
	if m == nil || period == "P" {
		return t, fmt.Errorf("period %q", period)
	}
	var n [3]int
	for i := range n {
		n[i], _ = strconv.Atoi("0" + m[i+1])
	}
	return t.AddDate(n[0], n[1], n[2]), nil
}

func (s *Server) getPolicy(c *call) (any, error) {
	c.version = ""
	k, _, err := s.lookup(c)
	if err != nil {
		return nil, err
	}
	return s.policy(k), nil
}

// policy returns what is shown of a key's policy. The service has one by itself:
// it notifies 30 days before a version expires.
func (s *Server) policy(k *key) *rotationPolicy {
	p := rotationPolicy{Attributes: &policyAttributes{}}
	if k.policy != nil {
		p = *k.policy
	}
	p.ID = "https://" + k.host + "/keys/" + k.name + "/rotationpolicy"
	notifies := false
	for _, a := range p.Actions {
		notifies = notifies || strings.EqualFold(a.Action.Type, "Notify")
	}
	if !notifies {
		var a lifetimeAction
		a.Action.Type, a.Trigger.BeforeExpiry = "Notify", "P30D"
		p.Actions = append(p.Actions[:len(p.Actions):len(p.Actions)], a)
	}
	return &p
}

func (s *Server) setPolicy(c *call) (any, error) {
	c.version = ""
	k, _, err := s.lookup(c)
	if err != nil {
		return nil, err
	}
	var p rotationPolicy
	if err := json.Unmarshal(c.body, &p); err != nil {
		return nil, badParameter("The request body is not valid JSON.")
	}
	if p.Attributes == nil {
		p.Attributes = &policyAttributes{}
	}
	for _, period := range []string{p.Attributes.ExpiryTime} {
		if _, err := addPeriod(time.Time{}, period); period != "" && err != nil {
			return nil, badParameter("Property expiryTime has the invalid value %q.", period)
		}
	}
	for _, a := range p.Actions {
		t := a.Trigger
		if (t.AfterCreate == "") == (t.BeforeExpiry == "") {
			return nil, badParameter("A lifetime action needs one trigger.")
		}
		if _, err := addPeriod(time.Time{}, t.AfterCreate+t.BeforeExpiry); err != nil {
			return nil, badParameter("A lifetime action has an invalid trigger.")
		}
		if t.BeforeExpiry != "" && p.Attributes.ExpiryTime == "" && strings.EqualFold(a.Action.Type, "Rotate") {
			return nil, badParameter("A rotation before the expiry needs an expiryTime.")
		}
	}
	now := s.opts.Now().Unix()
	p.Attributes.Created, p.Attributes.Updated = now, now
	if k.policy != nil {
		p.Attributes.Created = k.policy.Attributes.Created
	}
	k.policy = &p
	return s.policy(k), nil
}
