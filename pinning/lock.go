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

// lock is a flock on an open directory. The kernel drops it with the process.
type lock struct{ fd int }

// lockPoll is how often a held lock is tried again.
const lockPoll = 500 * time.Microsecond

// acquire takes the lock on path, for which it waits at most as long as timeout
// says. It returns [ErrLocked] when that is over or ctx ends.
func acquire(ctx context.Context, path string, timeout time.Duration) (*lock, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", &os.PathError{Op: "open", Path: path, Err: err})
	}
	l := &lock{fd}
	// No timer is made for a lock that is free, as it nearly always is: the
	// first one of a process costs a thread.
	held, err := l.try()
	if held && timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	for ; held && timeout > 0 && ctx.Err() == nil; held, err = l.try() {
		select {
		case <-ctx.Done():
		case <-time.After(lockPoll):
		}
	}
	if held {
		err = ErrLocked
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), l.release())
	}
	return l, nil
}

// try takes the lock unless somebody holds it.
func (l *lock) try() (held bool, err error) {
	err = unix.Flock(l.fd, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, unix.EINTR) {
		return true, nil
	}
	return false, err
}

func (l *lock) release() error { return unix.Close(l.fd) }
