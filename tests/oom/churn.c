/* A process of tests/oom/test_joining.py: mergeable memory that every one of them has, then
 *
 *	churn stay		wait to be killed; fork at each SIGUSR1, and the child waits, too, and touches nothing
 *	churn MILLISECONDS	fork in the middle of that time; parent and child end at its end
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <signal.h>
#include <unistd.h>

#define SIZE (2UL << 20)

static void on_signal(int signal)
{
	(void)signal;
	if (!fork())
		prctl(PR_SET_PDEATHSIG, SIGKILL);
}

int main(int argc, char **argv)
{
	char *p = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	unsigned half;

	if (argc != 2 || p == MAP_FAILED)
		return 1;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (unsigned long i = 0; i < SIZE; i += 4096)
		memset(p + i, (int)(1 + i / 4096 % 100), 4096);
	if (madvise(p, SIZE, MADV_MERGEABLE))
		return 1;
	signal(SIGUSR1, on_signal);
	if (!strcmp(argv[1], "stay"))
		for (;;)
			pause();
	half = (unsigned)atoi(argv[1]) * 500;
	usleep(half);
	fork();
	usleep(half);
	for (unsigned long i = 0; i < SIZE; i++)
		if (p[i] != (char)(1 + i / 4096 % 100))
			abort();
	return 0;
}
