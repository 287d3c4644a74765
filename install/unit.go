// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package install

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// Unit is the systemd unit of the daemon (systemd.service(5)).
type Unit struct {
	// Dir is where units are, "/etc/systemd/system".
	Dir string
	// Name of the unit, "podgate.service".
	Name string
	// PolicyDir is where the daemon looks for manifests.
	PolicyDir string
	// Systemctl runs systemctl(1).
	Systemctl func(ctx context.Context, args ...string) error
}

// Systemctl runs the systemctl of the node.
func Systemctl(ctx context.Context, args ...string) error {
	out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

func (u *Unit) path() string { return filepath.Join(u.Dir, u.Name) }

// wanted is the link that makes the unit start with the node, as
// "systemctl enable" makes it.
func (u *Unit) wanted() string { return filepath.Join(u.Dir, "multi-user.target.wants", u.Name) }

// text of the unit. The daemon is asked for nothing that would give it a mount
// namespace of its own: a BPF file system that it mounts is the node's.
func (n *node) text() string {
	command := []string{
		filepath.Join(n.CommandDir, commandName), "sync", "--policy-dir", n.Unit.PolicyDir,
		"--bpffs", n.Pins.Layout.BPFFS, "--instance", n.Pins.Layout.Name, "--run-dir", n.RunDir,
	}
	for i, word := range command {
		command[i] = unitWord(word)
	}
	return `# Written by podgate install, removed by podgate uninstall.
[Unit]
Description=podgate, network policy for the pods of this node
Before=containerd.service crio.service kubelet.service
# It is tried for as long as it takes.
StartLimitIntervalSec=0

[Service]
ExecStart=` + strings.Join(command, " ") + `
# The kernel enforces what it has while the daemon is away.
Restart=always
RestartSec=1s
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes

[Install]
WantedBy=multi-user.target
`
}

// unitWord quotes an argument of a command line in a unit, where it needs to be.
func unitWord(s string) string {
	s = strings.NewReplacer("%", "%%", "$", "$$").Replace(s)
	if strings.ContainsAny(s, " \t\"'\\;") {
		return strconv.Quote(s)
	}
	return s
}

// unit places the unit and starts it, or again with what is new.
func (n *node) unit() ([]step, error) {
	steps, err := n.file(n.Unit.path(), []byte(n.text()), 0o644)
	if err != nil {
		return nil, err
	}
	link, err := n.link(filepath.Join("..", n.Unit.Name), n.Unit.wanted())
	if err != nil {
		return nil, err
	}
	steps = append(steps, link...)
	if _, _, ours := n.changes.find(KindUnit, n.Unit.Name); !ours {
		if running, err := n.Daemon(); err != nil {
			return nil, err
		} else if running {
			return nil, fmt.Errorf("%w without %s: stop it, so that systemd can start it", ErrRunning, n.Unit.Name)
		}
	}
	return append(steps, step{"start " + n.Unit.Name, func(ctx context.Context) error {
		if _, _, ok := n.changes.find(KindUnit, n.Unit.Name); !ok {
			if err := n.note(Record{Did: KindUnit, Path: n.Unit.Name, Undo: "stop it"}); err != nil {
				return err
			}
		}
		if err := n.Unit.Systemctl(ctx, "daemon-reload"); err != nil {
			return err
		}
		n.point("reloaded " + n.Unit.Name)
		return n.Unit.Systemctl(ctx, "restart", n.Unit.Name)
	}}), nil
}
