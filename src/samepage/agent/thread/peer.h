/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the files about the agent's thread share: thread.c begins and ends it, forked.c says what it is in a child, call.c brings
 * it work from the application's threads, peer.c joins the service and goes round, who.c watches who the process is, wire.c
 * sends and receives, and serve.c answers.
 *
 * What begins and ends the thread is done under `life`. What it keeps for itself (the connection, the packets, the calls it
 * takes) it alone touches, but for the atomic fields.
 */
#ifndef SAMEPAGE_THREAD_PEER_H
#define SAMEPAGE_THREAD_PEER_H

#include "base/descriptors.h"
#include "base/system.h"
#include "thread/thread.h"

/* ---- thread.c ---- */

enum { IDLE, RUNNING, RETIRED };

extern struct thread {
	_Atomic int state;
	_Atomic uint32_t tid; /* of a thread that lives; the kernel makes it 0 when that has ended */
	pid_t owner;	   /* the process this memory is of; in a child by vfork, or one that forked past us, another */
	_Atomic bool stop; /* it is to end */
	_Atomic bool wanted; /* something was to be merged once */
	_Atomic int away;    /* not 0: none may begin (agent_leave) */
	bool delay;	     /* it is to wait before it joins */
} thread;

/* Serialises what starts and stops the thread. Signals are blocked while it is held. */
extern struct mutex life;

bool thread_is_here(void); /* there is one, and it is this process's */
int thread_start(void);	   /* needs `life`; 0 or -errno */
void thread_retires(void); /* on the thread: it ends, for good */
/* To be noted before the application changes it for itself: who it is, where it may run and take memory from. */
void thread_note_defaults(void);
void thread_settle(void); /* on the thread: as the process was started, and not as who made it happens to run */

/* ---- forked.c ---- */

void forked_unseen(void);     /* in a child of a fork that passed no wrapper */
uint32_t ms_since_fork(void); /* UINT32_MAX: there was none, or long ago */

/* ---- call.c ---- */

bool calls_open(void); /* on the thread: from now on it takes calls */
bool calls_taken(void);
void calls_close(void);
void calls_forget(void); /* in a forked child */
void thread_wake(void);
/* Waits for `events` of a descriptor (-1: of none), for a call, or the time; takes the call. What came of the events. */
short wait_for(int fd, short events, int timeout_ms);

/* ---- peer.c ---- */

extern struct peer {
	char path[108];	 /* of struct sockaddr_un; "": none */
	char domain[32]; /* that is asked for; "": none */
	int attached;	 /* a socket to serve instead, -1 */
	int sock;
	_Atomic bool joined;
} peer;

void peer_main(void);	/* what the thread does */
void peer_forget(void); /* its descriptors are not its own: nothing is closed */

/* ---- who.c ---- */

bool is_same(void); /* on the thread: its users and groups are still those of the thread that leads the process */

/* ---- wire.c ---- */

extern void *const payload, *const answer; /* of the packet received, and of the one to be sent */
#define ANSWER_MAX (SP_MSG_MAX - sizeof(struct sp_hdr))

/* Receives one packet; *fd is the descriptor it brought, or -1. Bytes of payload; -EAGAIN: there is none; -EPIPE: the peer
 * went, or talks nonsense. */
ssize_t receive(struct sp_hdr *head, int *fd);
/* False: the connection is of no use, or the thread is to end. */
bool transmit(uint32_t op, uint32_t seq, int error, size_t len, int fd);

/* ---- serve.c ---- */

bool serve(void); /* answers one request; false: the connection is of no more use */

#endif
