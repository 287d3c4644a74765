// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package cluster

import (
	"context"
	"errors"
	"fmt"
)

// shutdown ends every process of a node but PID 1, and forgets what a machine
// forgets: mounts, interfaces but its own, /run, the BPF file system.
const shutdown = `
kill -9 -1
sleep 1
awk '{ print $2 }' /proc/self/mounts | grep -E '^/(run/|var/lib/kubelet/)' | sort -r | while read -r m; do umount -l "$m"; done
find /run -mindepth 1 -delete
mkdir -p /run/netns /run/lock
for i in $(ls /sys/class/net); do
	case $i in lo | eth0) ;; *) ip link delete "$i" 2>/dev/null || true ;; esac
done
nft flush ruleset
umount /sys/fs/bpf
mount -t bpf bpf /sys/fs/bpf
`

// Reboot ends all that runs on a node, and starts it again with what is on its
// disk. It returns when the node is ready.
func (n *Node) Reboot(ctx context.Context) error {
	if _, err := n.Exec(ctx, "/bin/bash", "-c", shutdown); err != nil {
		return err
	}
	for _, p := range []*Process{n.Containerd, n.Kubelet, n.Proxy} {
		if err := p.Wait(ctx); ctx.Err() != nil {
			return err
		}
	}
	if err := n.Containerd.Start(); err != nil {
		return err
	}
	if err := n.WaitContainerd(ctx); err != nil {
		return err
	}
	if err := errors.Join(n.Proxy.Start(), n.Kubelet.Start()); err != nil {
		return fmt.Errorf("reboot of %s: %w", n.Name, err)
	}
	return n.WaitReady(ctx)
}
