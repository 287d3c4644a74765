// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Command kernels fills a directory with the CNI plugins that tests need in a
// virtual machine, which has no Go to build them. See docs/kernels.md.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/podgate/podgate/test/netlab"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: kernels DIRECTORY")
		os.Exit(2)
	}
	if err := netlab.Build(context.Background(), os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
