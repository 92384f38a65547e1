//go:build !purego

package ceiling

var loops = map[string]loop{"neon": {neon, 16 * 16}}

func neon(n int)
