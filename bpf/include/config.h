/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Copyright The podgate Authors */
/* Constants the loader sets before the programs are verified. */
#pragma once

#include "types.h"

/* Slots of the gates table less one; slots are a power of two. */
volatile const __u32 gate_mask = 4095;

/* The kernel's timer frequency; bpf_jiffies64 costs nothing, a clock does. */
volatile const __u64 jiffies_per_second = 250;

/* Life of an idle flow in jiffies, at kind * FLOW_STATES + state. */
volatile const __u64 flow_timeouts[FLOW_TIMEOUTS] = {};

/* Life of a neighbours entry in jiffies: that of an idle connection. */
volatile const __u64 neighbour_timeout = 5 * 24 * 60 * 60 * 250ULL;

/* Life of a fragment entry in jiffies (RFC 791 3.2, RFC 8200 4.5). */
volatile const __u64 fragment_timeout = 60 * 250;
