// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package runtime tests podgate under a real container runtime: a containerd
// of its own, spoken to as the kubelet does (CRI), that runs pods from an image
// made here. Nothing is pulled.
//
// It is a module of its own because it speaks gRPC. Debian's containerd and
// runc will do.
package runtime
