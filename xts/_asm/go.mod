module hostcryptd/xts/_asm

go 1.26.0
