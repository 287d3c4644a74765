// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package need lets tests put podgate next to other programs where there are
// some. Building and testing podgate needs none of them.
package need

import (
	"os"
	"os/exec"
	"testing"
)

// everything is the environment variable that turns skips into failures. A
// machine that is meant to have everything (.ci/run) sets it to 1.
const everything = "PODGATE_TEST_NEED_ALL"

// Tools skips the test on a machine that lacks one of the programs.
func Tools(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		_, err := exec.LookPath(p)
		switch {
		case err == nil:
		case os.Getenv(everything) == "1":
			t.Fatal(err)
		default:
			t.Skipf("%v; with %s=1 this fails", err, everything)
		}
	}
}
