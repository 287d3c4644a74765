// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"
)

// podArgs is what Kubernetes runtimes tell of a pod in CNI_ARGS. All of it is
// empty with other runtimes.
type podArgs struct {
	namespace, name, uid string
}

// parseArgs reads CNI_ARGS: "key=value" pairs with semicolons between them. It
// takes keys it does not know, which libcni's own parser does only when a
// runtime sets IgnoreUnknown. It fails with [errArgs].
func parseArgs(s string) (podArgs, error) {
	var pod podArgs
	for pair := range strings.SplitSeq(s, ";") {
		if pair == "" {
			continue
		}
		key, value, ok := strings.Cut(pair, "=")
		if !ok {
			return podArgs{}, fmt.Errorf("%w: %q is not key=value", errArgs, pair)
		}
		switch key {
		case "K8S_POD_NAMESPACE":
			pod.namespace = value
		case "K8S_POD_NAME":
			pod.name = value
		case "K8S_POD_UID":
			pod.uid = value
		}
	}
	return pod, nil
}
