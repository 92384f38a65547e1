//go:build (!amd64 && !arm64) || purego

package xts

// tiers are the implementations in this build, the fastest first.
var tiers = []*tier{&generic}
