// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Command podgate-cni gates pods: a chained CNI plugin for the specification
// versions 0.3.0 to 1.1.0. It attaches the pinned programs to the host side of
// every veth of the pod and claims the pod's addresses; it needs no daemon.
//
// Under the name podgate-ipam the same binary stands in front of an IPAM plugin
// and claims addresses as they are allocated.
//
// It takes its parameters from the environment and stdin, prints results and
// errors to stdout and logs to stderr, as the CNI specification has it.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	cniversion "github.com/containernetworking/cni/pkg/version"
)

// version is set by the linker.
var version = "unknown"

func main() {
	name := filepath.Base(os.Args[0])
	ctx := context.Background()
	call := &call{stdout: os.Stdout, stderr: os.Stderr}
	funcs := call.gate(ctx)
	if name == "podgate-ipam" {
		funcs = call.ipam(ctx)
	}
	about := fmt.Sprintf("CNI plugin %s %s", name, version)
	supported := cniversion.PluginSupports("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
	if err := skel.PluginMainFuncsWithError(funcs, supported, about); err != nil {
		printError(os.Stdout, call.cniVersion, err)
		os.Exit(1)
	}
}

// call is one call of the plugin.
type call struct {
	stdout, stderr io.Writer
	// cniVersion of the configuration, once it is read.
	cniVersion string
}

func (c *call) gate(ctx context.Context) skel.CNIFuncs {
	verb := func(fn func(context.Context, *skel.CmdArgs) error) func(*skel.CmdArgs) error {
		return c.verb(func(args *skel.CmdArgs) error { return fn(ctx, args) })
	}
	return skel.CNIFuncs{Add: verb(c.add), Del: verb(c.del), Check: verb(c.check), GC: verb(c.gc), Status: verb(c.status)}
}

func (c *call) ipam(ctx context.Context) skel.CNIFuncs {
	verb := func(fn func(*ipamCall, context.Context) error) func(*skel.CmdArgs) error {
		return c.verb(func(args *skel.CmdArgs) error { return c.withIPAM(ctx, args, fn) })
	}
	return skel.CNIFuncs{
		Add:    verb((*ipamCall).add),
		Del:    verb((*ipamCall).del),
		Check:  verb((*ipamCall).check),
		GC:     verb((*ipamCall).gc),
		Status: verb((*ipamCall).status),
	}
}

// verb notes the version of the call, for its result or error, and gives every
// error its CNI code.
func (c *call) verb(fn func(*skel.CmdArgs) error) func(*skel.CmdArgs) error {
	return func(args *skel.CmdArgs) (err error) {
		if c.cniVersion, err = (&cniversion.ConfigDecoder{}).Decode(args.StdinData); err != nil {
			return err
		}
		return coded(fn(args))
	}
}

// print writes a result, in the version of the configuration.
func (c *call) print(result types.Result) error {
	r, err := result.GetAsVersion(c.cniVersion)
	if err != nil {
		return err
	}
	return r.PrintTo(c.stdout)
}

// printError writes an error result (CNI specification 1.1, section 5). The
// specification wants the version, which skel leaves out.
func printError(w io.Writer, cniVersion string, e *types.Error) {
	if cniVersion == "" {
		cniVersion = cniversion.Current()
	}
	// Writing these fields to JSON cannot fail, and when stdout is closed the
	// exit code is all that is left.
	b, _ := json.MarshalIndent(struct {
		CNIVersion string `json:"cniVersion"`
		*types.Error
	}{cniVersion, e}, "", "    ")
	_, _ = w.Write(b)
}
