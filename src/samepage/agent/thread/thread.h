/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The agent's thread, as the layers above it know it. Any thread may call all of this, without the mmap_lock but where it says
 * otherwise. Behind it: peer.h.
 */
#ifndef SAMEPAGE_THREAD_THREAD_H
#define SAMEPAGE_THREAD_THREAD_H

#include "base/page.h"
#include "base/wire.h"

#include <signal.h>
#include <stdatomic.h>

/* Runs fn(arg) on the agent thread and waits. 0, or -ENOTCONN when there is no agent thread. */
int agent_call(void (*fn)(void *arg), void *arg);
/* There is something to merge: start the agent thread if there is a service to join and none yet. */
void agent_start(void);
/* The same for memory of a process that was told to merge all of it by whoever started it, and names none: so many bytes were
 * mapped or made writable. Small processes are not worth a thread, and some look whether they have only one: Chromium's
 * zygote, which maps 5 MiB. */
void agent_start_unnamed(size_t bytes);
void agent_stop(void);	 /* ends the thread; merged memory stays merged */
void agent_retire(void); /* the same, for good */
/* Around a call that the thread must not be there for, or would be left behind by: what agent_leave says agent_return is
 * told. */
bool agent_leave(void);
void agent_return(bool left);
/* The service to join ($SAMEPAGE_SOCKET), and the merge domain to ask it for ($SAMEPAGE_DOMAIN), from the constructor. */
void agent_configure(const char *path, const char *domain);
bool agent_configured(void); /* there is a service to join, or one was attached */

/* Breaks merged pages as break_ksm() does: on the agent thread, or where there is none, here and now. */
void unmerge_range(uintptr_t start, uintptr_t end, uint64_t max_pages, struct sp_broken *out);

/* A fork, which is noted before there is a child that could ask the service for anything. Needs the lock. */
void note_fork(void);
/* In the child: begins anew, with the lock free. `plain`: by a system call rather than fork(3), so nothing may be called that is
 * not async-signal-safe. */
void forked(bool plain);

/* The process is, or was, a virtual machine's (KVM): whatever becomes of its mappings its guest has to be told. */
extern _Atomic bool has_guest;

#endif
