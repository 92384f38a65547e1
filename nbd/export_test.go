package nbd

import "time"

// SetSettleTime changes how long new connections of s wait for those that are ending.
func (s *Server) SetSettleTime(d time.Duration) { s.settleTime = d }
