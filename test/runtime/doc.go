// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package runtime tests podgate under real container runtimes: a containerd of
// its own, spoken to as the kubelet does (CRI), and podman, which run pods from
// images made here, and under multus. Nothing is pulled.
//
// It is a module of its own because it speaks gRPC. Debian's containerd, podman
// and runc will do; the containerd of the Kubernetes cluster is a second one,
// where that is built.
package runtime
