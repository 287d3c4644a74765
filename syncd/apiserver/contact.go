// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

// contact watches over the requests for one resource.
type contact struct {
	cache.ListerWatcherWithContext
	// changed is called when an answer differs from the one before.
	changed func()

	mu sync.Mutex
	// asked is when the request under way was made; zero if there is none.
	asked time.Time
	// failed is when the first request was made of those that failed since the
	// last that did not, err what is wrong with the latest.
	failed time.Time
	err    string
}

// List implements [cache.Lister].
func (c *contact) List(options metav1.ListOptions) (runtime.Object, error) {
	return c.ListWithContext(context.Background(), options)
}

// Watch implements [cache.Watcher].
func (c *contact) Watch(options metav1.ListOptions) (watch.Interface, error) {
	return c.WatchWithContext(context.Background(), options)
}

// ListWithContext lists the resource.
func (c *contact) ListWithContext(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
	c.ask()
	list, err := c.ListerWatcherWithContext.ListWithContext(ctx, options)
	c.answer(ctx, err)
	return list, err
}

// WatchWithContext begins a watch.
func (c *contact) WatchWithContext(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
	c.ask()
	w, err := c.ListerWatcherWithContext.WatchWithContext(ctx, options)
	c.answer(ctx, err)
	return w, err
}

func (c *contact) ask() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked = time.Now()
}

func (c *contact) answer(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.err
	switch {
	case err == nil:
		c.failed, c.err = time.Time{}, ""
	case c.failed.IsZero():
		c.failed, c.err = c.asked, reason(err)
	default:
		c.err = reason(err)
	}
	c.asked = time.Time{}
	if c.err != before {
		c.changed()
	}
}

// outage answers since when the server has not answered, and what it is like.
// With no outage there is no reason. A request that fails once, as when the
// server is restarted, is none yet.
func (c *contact) outage(now time.Time, patience time.Duration) (since time.Time, reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case !c.failed.IsZero() && now.Sub(c.failed) > patience/5:
		return c.failed, c.err
	case !c.asked.IsZero() && now.Sub(c.asked) > patience:
		return c.asked, fmt.Sprintf("no answer within %v", patience)
	}
	return time.Time{}, ""
}

// reason is what is wrong without what is different each time, such as the
// client's port.
func reason(err error) string {
	var (
		request   *url.Error
		operation *net.OpError
	)
	if errors.As(err, &operation) {
		if operation.Addr == nil {
			return fmt.Sprintf("%s: %v", operation.Op, operation.Err)
		}
		return fmt.Sprintf("%s %s: %v", operation.Op, operation.Addr, operation.Err)
	}
	if errors.As(err, &request) {
		return request.Err.Error()
	}
	return err.Error()
}
