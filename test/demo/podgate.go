// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/renameio/v2"
)

//go:embed manifests
var manifests embed.FS

// command is podgate's binary, for the lab's node.
type command struct {
	lab    *lab
	binary string
	daemon *exec.Cmd
	log    bytes.Buffer
}

// policyDir is what podgate sync reads.
func (c *command) policyDir() string { return filepath.Join(c.lab.node.Dir, "policy") }

// publish puts a manifest into the policy directory and returns its text.
func (c *command) publish(name string) (string, error) {
	text, err := manifests.ReadFile("manifests/" + name)
	if err != nil {
		return "", err
	}
	return string(text), renameio.WriteFile(filepath.Join(c.policyDir(), name), text, 0o600)
}

// start runs podgate sync until kill.
func (c *command) start() error {
	if err := os.MkdirAll(c.policyDir(), 0o700); err != nil {
		return err
	}
	c.daemon = c.prepare(context.Background(), "sync", "--policy-dir", c.policyDir())
	c.daemon.Stderr = &c.log
	if err := c.lab.node.Do(c.daemon.Start); err != nil {
		c.daemon = nil
		return err
	}
	return nil
}

// kill ends podgate sync the hard way.
func (c *command) kill() (pid int, err error) {
	if c.daemon == nil {
		return 0, nil
	}
	pid = c.daemon.Process.Pid
	if err := c.daemon.Process.Kill(); err != nil {
		return pid, err
	}
	_ = c.daemon.Wait() // "signal: killed"
	c.daemon = nil
	return pid, nil
}

// prepare is podgate with the flags that name this node's state.
func (c *command) prepare(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, c.binary, append(args,
		"--bpffs", c.lab.node.BPFFS, "--run-dir", filepath.Join(c.lab.node.Dir, "run"))...)
}

// found is podgate's exit code for "done, and problems found".
const found = 2

// output runs a command and returns what it says.
func (c *command) output(ctx context.Context, args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd := c.prepare(ctx, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := c.lab.node.Do(cmd.Run)
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == found {
		err = nil
	}
	if err != nil {
		return "", fmt.Errorf("podgate %s: %w\n%s", args[0], err, &stderr)
	}
	return stdout.String(), nil
}

// json runs a command and decodes what it says.
func (c *command) json(ctx context.Context, into any, args ...string) error {
	out, err := c.output(ctx, append(args, "-o", "json")...)
	if err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(out), into); err != nil {
		return fmt.Errorf("podgate %s: %w", args[0], err)
	}
	return nil
}

// synced waits until everything published so far is enforced.
func (c *command) synced(ctx context.Context, since time.Time, policies int) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		var status struct {
			Daemon *struct {
				Synced   time.Time
				Policies int
				Problems []struct{ Subject, Reason string }
			}
		}
		err := c.json(ctx, &status, "status")
		d := status.Daemon
		if err == nil && d != nil && d.Synced.After(since) && d.Policies == policies && len(d.Problems) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("podgate sync does not get ready: %w, %+v\n%s", errors.Join(err, ctx.Err()), d, &c.log)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// matrix asks podgate who can reach whom.
func (c *command) matrix(ctx context.Context) (matrix, error) {
	var report struct {
		Cells []struct {
			From, To, Port, Verdict string
			Disagree                bool
		}
	}
	args := []string{"matrix"}
	names := map[string]port{}
	for _, p := range ports {
		text := fmt.Sprintf("%d/%s", p.number, strings.ToUpper(p.protocol))
		names[text] = p
		args = append(args, "--ports", text)
	}
	for _, p := range c.lab.pods {
		args = append(args, "--pods", p.fullName())
	}
	if err := c.json(ctx, &report, args...); err != nil {
		return nil, err
	}
	m := matrix{}
	for _, cell := range report.Cells {
		if cell.Disagree {
			return nil, fmt.Errorf("compiler and kernel disagree: %+v", cell)
		}
		if cell.From == cell.To {
			continue
		}
		_, from, _ := strings.Cut(cell.From, "/")
		_, to, _ := strings.Cut(cell.To, "/")
		m[pair{from, to, names[cell.Port]}] = families{
			v4: cell.Verdict == "allow" || cell.Verdict == "v4",
			v6: cell.Verdict == "allow" || cell.Verdict == "v6",
		}
	}
	return m, nil
}

func (p *pod) fullName() string { return p.Namespace + "/" + p.Name }
