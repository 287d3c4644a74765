// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Command pod is all that the images of this test contain.
//
//	pod serve ADDRESS    accept TCP connections until it is killed
//	pod dial ADDRESS     connect within two seconds; exit code 2 for a time-out
package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"
)

func main() {
	if len(os.Args) != 3 {
		fail(errors.New("usage: pod serve|dial ADDRESS"))
	}
	var err error
	switch verb, address := os.Args[1], os.Args[2]; verb {
	case "serve":
		err = serve(address)
	case "dial":
		err = dial(address)
	default:
		err = fmt.Errorf("unknown verb %q", verb)
	}
	if err != nil {
		fail(err)
	}
}

func serve(address string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		c.Close()
	}
}

func dial(address string) error {
	c, err := net.DialTimeout("tcp", address, 2*time.Second)
	if err != nil {
		return err
	}
	return c.Close()
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "pod:", err)
	// A connect that runs out of time fails in one of two ways, by its
	// context's end or by the socket's: only Timeout is true of both.
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		os.Exit(2)
	}
	os.Exit(1)
}
