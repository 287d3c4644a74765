// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package bpf holds the datapath: its C sources, the object compiled from
// them and the Go types of its maps. What a map or field is for is said in
// include/types.h and include/maps.h.
//
// The object is committed, so building podgate takes no C compiler; `make
// generate` makes it anew.
package bpf
