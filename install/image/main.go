// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Command image makes podgate's container image of binaries that are there, and
// needs no container engine for it. `make image` calls it.
//
// It writes an OCI image layout, the same as one file, and a bill of materials
// for each platform. It is a module of its own because of what it requires.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(os.Stderr, "image: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("image", flag.ContinueOnError)
	var r release
	reference := flags.String("name", "", "`name` of the image, with a tag")
	flags.StringVar(&r.version, "version", "", "what the binaries say of themselves")
	flags.StringVar(&r.revision, "revision", "", "commit that they are of")
	epoch := flags.Int64("epoch", 0, "time of everything in the image, in `seconds` since 1970")
	flags.StringVar(&r.source, "source", ".", "`directory` of the sources")
	flags.StringVar(&r.binaries, "binaries", "bin", "`directory` with linux-amd64 and linux-arm64")
	out := flags.String("out", "bin", "`directory` to write to")
	push := flags.Bool("push", false, "push to the registry that the name says")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected %q", flags.Args())
	}
	tag, err := name.NewTag(*reference, name.StrictValidation)
	if err != nil {
		return fmt.Errorf("-name: %w", err)
	}
	r.created = time.Unix(*epoch, 0).UTC()

	b, err := r.bundle(ctx)
	if err != nil {
		return err
	}
	if err := b.write(filepath.Join(*out, "image"), tag, r.created); err != nil {
		return err
	}
	digest, err := b.index.Digest()
	if err != nil {
		return err
	}
	if *push {
		if err := b.push(tag, remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain)); err != nil {
			return err
		}
	}
	_, err = fmt.Printf("%s@%s\n", tag, digest)
	return err
}
