package vaulttest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"time"
)

// A Request is a line of the double's log. Bodies and tokens aren't in it.
type Request struct {
	Time            time.Time
	Route           string // see [Fault]
	Operation       string // as in the log of Key Vault, such as "KeyUnwrap"; empty for other services
	Duration        time.Duration
	Method          string
	Host            string
	Path            string // without query
	Status          int    // 0 for a connection that was cut off
	ClientID        string // identity of the token, if there was a valid one
	RequestID       string
	ClientRequestID string
	UserAgent       string
}

// Requests returns the log so far.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Request(nil), s.requests...)
}

// Count returns how many requests of a route the log has.
func (s *Server) Count(route string) int {
	n := 0
	for _, r := range s.Requests() {
		if r.Route == route {
			n++
		}
	}
	return n
}

// A Fault changes answers. Faults of one route apply in the order in which they
// were injected, each until it has been used up.
//
// The routes are "challenge" for every request to a vault without a valid token;
// with one "get", "versions", "create", "update", "delete", "rotate", "wrapkey",
// "unwrapkey", "getpolicy", "setpolicy", "getdeleted", "recover" and "purge"; and
// "imds", "arc", "token" and "discovery" for the identity endpoints.
type Fault struct {
	Route string
	Times int // how many requests; 0 means one, less means all from now on
	Do    FaultFunc
}

// A FaultFunc answers a request in place of the double. next is the double.
type FaultFunc func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc)

// Inject adds a fault.
func (s *Server) Inject(f Fault) {
	if f.Times == 0 {
		f.Times = 1
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = append(s.faults, &f)
}

// ClearFaults removes every fault.
func (s *Server) ClearFaults() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = nil
}

func (s *Server) takeFault(route string) FaultFunc {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.faults {
		if f.Route == route && f.Times != 0 {
			if f.Times > 0 {
				f.Times--
			}
			return f.Do
		}
	}
	return nil
}

// run serves one request of a route, with its fault if it has one, and logs it.
func (s *Server) run(w http.ResponseWriter, r *http.Request, entry Request, serve http.HandlerFunc) {
	entry.Time, entry.Method, entry.Host, entry.Path = s.opts.Now(), r.Method, hostName(r.Host), r.URL.Path
	entry.ClientRequestID, entry.UserAgent = r.Header.Get("x-ms-client-request-id"), r.UserAgent()
	sw := &statusWriter{ResponseWriter: w}
	begun := time.Now()
	defer func() {
		entry.Status, entry.Duration = sw.status, time.Since(begun)
		s.mu.Lock()
		s.requests = append(s.requests, entry)
		s.mu.Unlock()
	}()
	if f := s.takeFault(entry.Route); f != nil {
		f(sw, r, serve)
		return
	}
	serve(sw, r)
}

type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *statusWriter) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return w.ResponseWriter.Write(p)
}

func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Answer gives a fixed answer. header may be nil.
func Answer(status int, header http.Header, body string) FaultFunc {
	return func(w http.ResponseWriter, _ *http.Request, _ http.HandlerFunc) {
		for k, vs := range header {
			w.Header()[http.CanonicalHeaderKey(k)] = vs
		}
		w.WriteHeader(status)
		fmt.Fprint(w, body)
	}
}

// AnswerError gives an error in the form of Key Vault. An inner code is optional.
func AnswerError(status int, code, inner, message string) FaultFunc {
	return func(w http.ResponseWriter, _ *http.Request, _ http.HandlerFunc) {
		writeError(w, &apiError{status, code, inner, message})
	}
}

// Throttled is a 429 as the live service sends it: without Retry-After.
func Throttled() FaultFunc {
	return func(w http.ResponseWriter, _ *http.Request, _ http.HandlerFunc) { writeError(w, throttled) }
}

// ThrottledFor is a 429 that asks to wait.
func ThrottledFor(d time.Duration) FaultFunc {
	return func(w http.ResponseWriter, _ *http.Request, _ http.HandlerFunc) {
		w.Header().Set("Retry-After", fmt.Sprint(int(d.Seconds())))
		writeError(w, throttled)
	}
}

// Page is what a proxy or a load balancer says in a service's place.
func Page(status int) FaultFunc {
	return Answer(status, http.Header{"Content-Type": {"text/html"}}, "<html><head><title>"+http.StatusText(status)+"</title></head><body>nginx</body></html>\r\n")
}

// Slow waits before the true answer's headers and before its body.
func Slow(header, body time.Duration) FaultFunc {
	return func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
		rec := record(r, next)
		wait(r, header)
		rec.copyHeader(w)
		w.WriteHeader(rec.status)
		http.NewResponseController(w).Flush()
		wait(r, body)
		w.Write(rec.body.Bytes())
	}
}

func wait(r *http.Request, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-r.Context().Done():
		panic(http.ErrAbortHandler)
	}
}

// Hang doesn't answer while the client or the double is there.
func Hang(_ http.ResponseWriter, r *http.Request, _ http.HandlerFunc) {
	<-r.Context().Done()
	panic(http.ErrAbortHandler) // to return would be an empty answer
}

// Reset cuts the connection off without an answer.
func Reset(http.ResponseWriter, *http.Request, http.HandlerFunc) { panic(http.ErrAbortHandler) }

// Truncate cuts the connection off in the middle of the true answer.
func Truncate(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
	rec := record(r, next)
	rec.copyHeader(w)
	w.Header().Set("Content-Length", fmt.Sprint(rec.body.Len()))
	w.WriteHeader(rec.status)
	w.Write(rec.body.Bytes()[:rec.body.Len()/2])
	http.NewResponseController(w).Flush()
	panic(http.ErrAbortHandler)
}

// Rewrite lets edit change the members of the true answer, a JSON object.
func Rewrite(edit func(answer map[string]any)) FaultFunc {
	return func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
		rec := record(r, next)
		var answer map[string]any
		if err := json.Unmarshal(rec.body.Bytes(), &answer); err != nil {
			panic("vaulttest: Rewrite of an answer that isn't a JSON object")
		}
		edit(answer)
		rec.copyHeader(w)
		w.Header().Del("Content-Length")
		w.WriteHeader(rec.status)
		json.NewEncoder(w).Encode(answer)
	}
}

// recorder is a ResponseWriter that keeps the answer.
type recorder struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func record(r *http.Request, next http.HandlerFunc) *recorder {
	rec := &recorder{header: make(http.Header), status: http.StatusOK}
	next(rec, r)
	return rec
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(status int)      { r.status = status }
func (r *recorder) Write(p []byte) (int, error) { return r.body.Write(p) }

func (r *recorder) copyHeader(w http.ResponseWriter) {
	for k, vs := range r.header {
		w.Header()[k] = vs
	}
}
