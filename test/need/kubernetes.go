// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package need

import (
	"os"
	"path/filepath"
	"testing"
)

// cache is the environment variable that names the directory of what
// "make test-e2e" builds. Who names it means that it is there.
const cache = "PODGATE_E2E_CACHE"

// Kubernetes answers the directory of Kubernetes' programs that "make test-e2e"
// has built, and skips the test where one is not there.
func Kubernetes(t testing.TB, programs ...string) string {
	t.Helper()
	dir := os.Getenv(cache)
	if dir == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			t.Skipf("Kubernetes' programs: %v", err)
		}
		dir = filepath.Join(user, "podgate", "e2e")
	}
	bin := filepath.Join(dir, "bin")
	for _, p := range programs {
		_, err := os.Stat(filepath.Join(bin, p))
		switch {
		case err == nil:
		case os.Getenv(cache) != "":
			t.Fatalf("%s: %v", cache, err)
		default:
			t.Skipf("%v; \"make test-e2e\" builds it", err)
		}
	}
	return bin
}
