// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package cluster

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/podgate/podgate/test/netlab"
)

// Plugins fills dir, which must exist, with the reference CNI plugins and with
// podgate of this source tree, in whose root directory the process must be.
func Plugins(ctx context.Context, dir string) error {
	if err := netlab.Build(ctx, dir); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", filepath.Join(dir, "podgate"), "./cmd/podgate")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build ./cmd/podgate: %w\n%s", err, out)
	}
	return nil
}
