// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// The maps of an instance can be seen from any network namespace, interfaces
// only from the node's. ADD is called there; whoever comes later and is
// elsewhere would take all interfaces for gone, and what is attached for
// detached.

// settleIn notes the network namespace of the calling thread as the node's.
func (sh *shared) settleIn() error {
	here, err := networkNamespace()
	if err == nil {
		atomic.StoreUint64(&sh.state.Netns, here)
	}
	return err
}

// atHome returns [ErrNetNS] when the calling thread is in another network
// namespace than the last ADD was.
func (s *State) atHome() error {
	if s.private {
		return nil
	}
	sh, err := s.memory()
	if err != nil {
		return err
	}
	home := atomic.LoadUint64(&sh.state.Netns)
	if home == 0 {
		return nil
	}
	here, err := networkNamespace()
	if err != nil {
		return err
	}
	if here != home {
		return fmt.Errorf("%w: this is net:[%d], pods were added in net:[%d]", ErrNetNS, here, home)
	}
	return nil
}

// networkNamespace is the inode of the calling thread's (namespaces(7)).
func networkNamespace() (uint64, error) {
	const path = "/proc/thread-self/ns/net"
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, fmt.Errorf("network namespace: %w", &os.PathError{Op: "stat", Path: path, Err: err})
	}
	return st.Ino, nil
}
