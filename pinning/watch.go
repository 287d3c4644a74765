// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// watchInterval bounds how long a change may go unnoticed when neither the
// file system nor netlink reports it.
const watchInterval = time.Second

// Watch returns a channel that gets a value after endpoints changed, and after
// a qdisc, filter or interface was removed, until ctx is done. Values are not
// queued: whoever gets one looks at everything. Close ends the watch too.
func (s *State) Watch(ctx context.Context) (<-chan struct{}, error) {
	sh, err := s.memory()
	if err != nil {
		return nil, err
	}
	files, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch: %w", err)
	}
	if err := files.Add(s.layout.VersionDir()); err != nil {
		_ = files.Close()
		return nil, fmt.Errorf("watch %s: %w", s.layout.VersionDir(), err)
	}
	sock, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_TC)
	if err != nil {
		_ = files.Close()
		return nil, fmt.Errorf("watch netlink: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	s.stopWatches = append(s.stopWatches, cancel)
	lost := make(chan struct{}, 1)
	go receiveLosses(ctx, sock, lost)

	out := make(chan struct{}, 1)
	s.watches.Go(func() {
		defer func() { _ = files.Close() }()
		defer sock.Close()
		seen := atomic.LoadUint32(&sh.state.Generation)
		tick := time.NewTicker(watchInterval)
		defer tick.Stop()
		for {
			changed := true
			select {
			case <-ctx.Done():
				return
			case <-files.Events:
			case err := <-files.Errors:
				s.log.Warn("watch", "error", err)
			case <-lost:
			case <-tick.C:
				changed = atomic.LoadUint32(&sh.state.Generation) != seen
			}
			seen = atomic.LoadUint32(&sh.state.Generation)
			if changed {
				signal(out)
			}
		}
	})
	return out, nil
}

func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// receiveLosses reports messages that something was removed. A full socket
// buffer counts as such.
func receiveLosses(ctx context.Context, sock *nl.NetlinkSocket, lost chan<- struct{}) {
	for ctx.Err() == nil {
		// So that the end of ctx is noticed; the socket has no other way.
		_ = sock.SetReceiveTimeout(&unix.Timeval{Sec: 1})
		messages, _, err := sock.Receive()
		if err != nil {
			if ctx.Err() == nil && err == unix.ENOBUFS { //nolint:errorlint // the netlink package returns it bare
				signal(lost)
			}
			continue
		}
		for _, m := range messages {
			switch m.Header.Type {
			case unix.RTM_DELLINK, unix.RTM_DELQDISC, unix.RTM_DELTFILTER:
				signal(lost)
			}
		}
	}
}
