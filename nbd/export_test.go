package nbd

import "time"

// SetSettleTime changes how long new connections of s wait for those that are ending.
func (s *Server) SetSettleTime(d time.Duration) { s.settleTime = d }

// SetSpareWorkers changes how many requests of clients may need a thread at the same
// time besides one for each.
func (s *Server) SetSpareWorkers(n int64) { s.spare.Store(n) }

// SpareWorkers returns how many more there may be.
func (s *Server) SpareWorkers() int64 { return s.spare.Load() }
