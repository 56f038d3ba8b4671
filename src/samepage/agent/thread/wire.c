/* SPDX-License-Identifier: Apache-2.0 */
/* Packets, and the descriptors that come with them. Whatever waits here takes calls meanwhile. */
#include "thread/peer.h"

#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define SEND_CHECK_MS 1000

static union {
	struct sp_hdr hdr;
	uint8_t bytes[SP_MSG_MAX];
} rx, tx __attribute__((aligned(8)));

void *const payload = rx.bytes + sizeof(struct sp_hdr);
void *const answer = tx.bytes + sizeof(struct sp_hdr);

ssize_t receive(struct sp_hdr *head, int *fd)
{
	union {
		struct cmsghdr align;
		char room[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec iov = {rx.bytes, sizeof(rx.bytes)};
	/* CMSG_LEN, not CMSG_SPACE: the padding of that has room for a second descriptor. */
	struct msghdr m = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = CMSG_LEN(sizeof(int))};
	struct cmsghdr *c;
	ssize_t got;

	*fd = -1;
	if (!descriptors_are_ours())
		return -EPIPE;
	got = recvmsg(peer.sock, &m, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
	if (got < 0 && errno == EAGAIN)
		return -EAGAIN;
	if (got > 0 && (c = CMSG_FIRSTHDR(&m)) && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
		memcpy(fd, CMSG_DATA(c), sizeof(*fd)); /* there is room for only one */
	if (got < (ssize_t)sizeof(struct sp_hdr) || (m.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) ||
	    rx.hdr.len != (size_t)got - sizeof(struct sp_hdr)) {
		if (*fd >= 0)
			close(*fd);
		*fd = -1;
		return -EPIPE;
	}
	*head = rx.hdr;
	return got - (ssize_t)sizeof(struct sp_hdr);
}

/* If the service reads slowly, or is stopped, the thread waits here and takes the application's calls meanwhile. */
bool transmit(uint32_t op, uint32_t seq, int error, size_t len, int fd)
{
	union {
		struct cmsghdr align;
		char room[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec iov = {tx.bytes, sizeof(struct sp_hdr) + len};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};

	tx.hdr = (struct sp_hdr){op, seq, error, (uint32_t)len};
	if (fd >= 0) {
		struct cmsghdr *c = &control.align;

		memset(&control, 0, sizeof(control));
		m.msg_control = &control;
		m.msg_controllen = sizeof(control);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &fd, sizeof(fd));
	}
	while (descriptors_are_ours()) {
		ssize_t put = sendmsg(peer.sock, &m, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (put >= 0 || errno != EAGAIN || atomic_load(&thread.stop))
			return put == (ssize_t)iov.iov_len;
		wait_for(peer.sock, POLLOUT, SEND_CHECK_MS);
	}
	return false;
}
