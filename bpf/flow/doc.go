// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package flow reads what the datapath says of packets: records of the event
// ring, and the words for verdicts, reasons and states.
package flow
