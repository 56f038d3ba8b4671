/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tests arch/ by itself: a task that arch_clone() makes on a stack of its own with its own thread-local storage, one on
 * this stack, and the hash of a page. Prints the results.
 */
#include "arch/arch.h"

#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>

#define FLAGS                                                                                                          \
	(CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | CLONE_SETTLS |             \
	 CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID)
#define SPACE (1UL << 20)

static struct seen {
	void *thread_pointer;
	int *place; /* of errno */
	uintptr_t stack;
} seen;

static void look(void *arg)
{
	struct seen *s = arg;

	s->thread_pointer = arch_thread_pointer();
	s->place = &errno;
	errno = 77;
	s->stack = (uintptr_t)&s;
}

static int fails(int line)
{
	printf("line %d\n", line);
	return 1;
}

int main(void)
{
	static _Atomic uint32_t tid = 1;
	static unsigned char page[4096];
	char *space = mmap(NULL, SPACE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *tp = space + 3 * SPACE / 4;
	long pid;

	arch_init();
	errno = 0;
	arch_tcb_init(tp);
	if (arch_clone(FLAGS, space + SPACE / 2, &tid, tp, look, &seen) <= 0)
		return fails(__LINE__);
	while (atomic_load(&tid))
		sched_yield();
	if (seen.thread_pointer != tp || errno || *seen.place != 77 || (char *)seen.place < space ||
	    (char *)seen.place >= space + SPACE || seen.stack < (uintptr_t)space ||
	    seen.stack >= (uintptr_t)space + SPACE / 2)
		return fails(__LINE__);
	memset(&seen, 0, sizeof(seen));
	pid = arch_clone(CLONE_VM | CLONE_VFORK | SIGCHLD, NULL, NULL, NULL, look, &seen);
	if (pid <= 0 || waitpid((pid_t)pid, NULL, 0) != pid)
		return fails(__LINE__);
	/* An emulator makes it a process with a memory of its own. */
	if (seen.stack && (seen.thread_pointer != arch_thread_pointer() || seen.stack >= (uintptr_t)&pid))
		return fails(__LINE__);
	for (size_t i = 0; i < sizeof(page); i++)
		page[i] = (unsigned char)(i * i >> 3);
	printf("%016llx\n", (unsigned long long)arch_hash()(page, sizeof(page)));
	return 0;
}
