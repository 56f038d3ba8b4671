/* SPDX-License-Identifier: Apache-2.0 */
/* Executes a program under a seccomp filter: filter ACTION NUMBER[!BIT],... COMMAND [ARG]... With BIT, the filter lets
 * a call through whose second argument has that bit. */
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

static const struct {
	const char *name;
	unsigned value;
} actions[] = {
	{"kill-process", SECCOMP_RET_KILL_PROCESS},
	{"kill-thread", SECCOMP_RET_KILL_THREAD},
	{"trap", SECCOMP_RET_TRAP},
	{"errno", SECCOMP_RET_ERRNO | EPERM},
	{"allow", SECCOMP_RET_ALLOW},
};

int main(int argc, char **argv)
{
	const struct rlimit none = {0, 0};
	struct sock_filter code[256] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr))};
	struct sock_fprog program = {1, code};
	unsigned action = SECCOMP_RET_ALLOW;

	if (argc < 4)
		return 2;
	for (size_t i = 0; i < sizeof(actions) / sizeof(actions[0]); i++)
		if (!strcmp(argv[1], actions[i].name))
			action = actions[i].value;
	for (char *at = strtok(argv[2], ","); at; at = strtok(NULL, ",")) {
		const char *bit = strchr(at, '!');
		const struct sock_filter unless[] = {
			BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])),
			BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, bit ? (unsigned)atoi(bit + 1) : 0, 0, 1),
			BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
		};

		code[program.len++] =
			(struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)atoi(at), 0, bit ? 4 : 1);
		if (bit) {
			memcpy(code + program.len, unless, sizeof(unless));
			program.len += 3;
		}
		code[program.len++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, action);
	}
	code[program.len++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	setrlimit(RLIMIT_CORE, &none);
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) {
		perror("seccomp");
		return 3;
	}
	execvp(argv[3], argv + 3);
	perror(argv[3]);
	return 127;
}
