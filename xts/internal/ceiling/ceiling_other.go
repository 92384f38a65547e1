//go:build (!amd64 && !arm64) || purego

package ceiling

var loops map[string]loop
