module cnbd

go 1.26
