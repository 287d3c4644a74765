// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Command images prints the names of the images that the Kubernetes project's
// network tests start pods from: pause first. KUBE_TEST_REPO_LIST chooses the
// registry, as it does for the tests.
package main

import (
	"fmt"

	"k8s.io/kubernetes/test/utils/image"
)

func main() {
	for _, id := range []image.ImageID{image.Pause, image.Agnhost, image.GlibcDnsTesting} {
		fmt.Println(image.GetE2EImage(id))
	}
}
