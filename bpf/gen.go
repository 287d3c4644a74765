// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package bpf

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -go-package bpf -target bpfel -type direction -type action -type verdict -type reason -type gate_flags -type ruleset_flags -type flow_kind -type flow_state -type flow_flags -type event_type -type event -type service_event -type services_mode -type address -type enforcement Datapath gate.c -- -O2 -g -Wall -Werror -mcpu=v3
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -go-package bpf -target bpfel -no-global-types Service service.c -- -O2 -g -Wall -Werror -mcpu=v3
