//go:build !purego

package ceiling

var loops = map[string]loop{
	"zmm": {zmm, 16 * 64},
	"ymm": {ymm, 12 * 32},
	"xmm": {xmm, 12 * 16},
}

func zmm(n int)
func ymm(n int)
func xmm(n int)
