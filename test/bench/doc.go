// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package bench measures what podgate costs a packet and a CNI call, next to
// floors measured in the same run: `make bench`. docs/benchmarks.md says what
// is compared and why. Its figures pass or miss a target; they fail no test.
package bench

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -go-package bench -target bpfel floor floor.c -- -O2 -g -Wall -Werror -mcpu=v3
