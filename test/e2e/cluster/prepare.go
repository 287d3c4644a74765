// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package cluster

import (
	"context"
	"fmt"
	"os/exec"

	"github.com/podgate/podgate/test/netlab"
)

// Plugins fills dir, which must exist, with the reference CNI plugins and with
// podgate of this source tree, in whose root directory the process must be: as
// `make build` makes it.
func Plugins(ctx context.Context, dir string) error {
	if err := netlab.BuildReference(ctx, dir); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "make", "build", "BIN="+dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("make build: %w\n%s", err, out)
	}
	return nil
}
