// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// lock is a flock on a directory. The kernel drops it with the process.
type lock struct{ dir *os.File }

// lockPoll is how often a held lock is tried again.
const lockPoll = 500 * time.Microsecond

// acquire takes the lock on path. It returns [ErrLocked] when ctx ends first.
func acquire(ctx context.Context, path string) (*lock, error) {
	dir, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	for {
		err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return &lock{dir}, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), dir.Close())
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("lock %s: %w", path, ErrLocked), dir.Close())
		case <-time.After(lockPoll):
		}
	}
}

func (l *lock) release() error { return l.dir.Close() }
