/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The agent's thread, as the layers above it know it. Any thread may call all of this, without the mmap_lock unless a
 * comment says otherwise. What is behind it: peer.h.
 */
#ifndef SAMEPAGE_THREAD_THREAD_H
#define SAMEPAGE_THREAD_THREAD_H

#include "base/page.h"
#include "base/wire.h"

#include <signal.h>
#include <stdatomic.h>

/* Runs fn(arg) on the agent thread and waits for it. Returns 0, or -ENOTCONN if there is no agent thread. */
int agent_call(void (*fn)(void *arg), void *arg);
/* Call this when there is something to merge. Starts the agent thread, if there is a service to join and no thread
 * yet. */
void agent_start(void);
/* The same, when `bytes` of memory that the program did not name itself were mapped or made writable (`samepage run
 * --memory`). Small processes are not worth a thread; and some check that they have only one, such as Chromium's
 * zygote, which maps 5 MiB. */
void agent_start_unnamed(size_t bytes);
void agent_stop(void);	 /* ends the thread; merged memory stays merged */
void agent_retire(void); /* the same, for good */
/* Put these around a call during which the thread must not exist, or which would leave it behind. Pass agent_return()
 * what agent_leave() returned. */
bool agent_leave(void);
void agent_return(bool left);
/* Sets the service to join ($SAMEPAGE_SOCKET), and the merge domain to ask it for ($SAMEPAGE_DOMAIN). Called by the
 * constructor. */
void agent_configure(const char *path, const char *domain);
void agent_unconfigure(void); /* for good */
bool agent_configured(void);  /* there is a service to join, or one was attached */
/* Whether there is a thread, or may be one. If not, the program may be under a seccomp filter that kills for whatever it
 * does not need itself. */
bool agent_may_run(void);

/* Breaks merged pages as break_ksm() does: on the agent thread, or on this one if there is none. */
void unmerge_range(uintptr_t start, uintptr_t end, uint64_t max_pages, struct sp_broken *out);

/* Notes a fork, before there is a child that could ask the service for anything. Needs the lock. */
void note_fork(void);
/* In the child: starts afresh, with the lock free. `plain`: after a system call rather than fork(3), so only
 * async-signal-safe functions may be called. */
void forked(bool plain);

/* The process is, or was, a virtual machine (KVM): the kernel has to tell its guest of each change of its mappings. */
extern _Atomic bool has_guest;

#endif
