/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who the process is: its user, groups, capabilities and root directory. A process shares pages within the merge domain
 * that it joined as who it was. So before any of these changes, the agent's thread ends, and its connection with it; a
 * thread that is started afterwards joins as what the process is then. libc applies such a change to all threads that
 * it knows, but it does not know this one, which must not keep what the process gives up.
 *
 * A bare system call changes only the calling thread; servers have threads that act for other users in that way. So it
 * counts only if that is the main thread. A change that passes no wrapper is noticed before pages are given away or
 * taken (is_same()).
 */
#include "base/real.h"
#include "base/system.h"
#include "hooks/hooks.h"

#include <errno.h>
#include <grp.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/prctl.h>
#include <unistd.h>

#ifndef SYS_landlock_restrict_self
#define SYS_landlock_restrict_self 446 /* 5.13 */
#endif

/* ---- changes ------------------------------------------------------------------------------------------- */

/* The value of a call made while the agent is away. */
#define AWAY(call)                                                                                                     \
	({                                                                                                             \
		bool left = agent_leave();                                                                             \
		__typeof__(call) ret = (call);                                                                         \
		agent_return(left);                                                                                    \
		ret;                                                                                                   \
	})

static bool leads(void)
{
	return agent_may_run() && real.syscall(SYS_gettid) == getpid();
}

bool changes_identity(long number, const long *arg)
{
	switch (number) {
	case SYS_setuid:
	case SYS_setgid:
	case SYS_setreuid:
	case SYS_setregid:
	case SYS_setresuid:
	case SYS_setresgid:
	case SYS_setgroups:
	case SYS_setfsuid:
	case SYS_setfsgid:
	case SYS_chroot:
	case SYS_capset:
	case SYS_landlock_restrict_self:
		break;
	case SYS_prctl:
		if (arg[0] != PR_CAPBSET_DROP && arg[0] != PR_SET_SECUREBITS && arg[0] != PR_CAP_AMBIENT)
			return false;
		break;
	default:
		return false;
	}
	return leads();
}

long syscall_away(long number, const long *arg)
{
	return AWAY(next.syscall(number, arg[0], arg[1], arg[2], arg[3], arg[4], arg[5]));
}

/* ---- libc's names -------------------------------------------------------------------------------------- */

/* Defines a wrapper of libc's function `name`, which `next` has, too. */
#define WRAP1(name, type)                                                                                              \
	SP_EXPORT int name(type a)                                                                                     \
	{                                                                                                              \
		need_next();                                                                                           \
		return AWAY(next.name(a));                                                                             \
	}
#define WRAP2(name, type, type2)                                                                                       \
	SP_EXPORT int name(type a, type2 b)                                                                            \
	{                                                                                                              \
		need_next();                                                                                           \
		return AWAY(next.name(a, b));                                                                          \
	}
#define WRAP3(name, type)                                                                                              \
	SP_EXPORT int name(type a, type b, type c)                                                                     \
	{                                                                                                              \
		need_next();                                                                                           \
		return AWAY(next.name(a, b, c));                                                                       \
	}

WRAP1(chroot, const char *) /* /proc/self/task/TID/root of the agent's thread would lead out */
WRAP1(setuid, uid_t)
WRAP1(seteuid, uid_t)
WRAP2(setreuid, uid_t, uid_t)
WRAP3(setresuid, uid_t)
WRAP1(setgid, gid_t)
WRAP1(setegid, gid_t)
WRAP2(setregid, gid_t, gid_t)
WRAP3(setresgid, gid_t)
WRAP2(setgroups, size_t, const gid_t *)
WRAP2(initgroups, const char *, gid_t)

/* The following calls change only the calling thread, with or without libc. */
SP_EXPORT int setfsuid(uid_t user)
{
	need_next();
	return leads() ? AWAY(next.setfsuid(user)) : next.setfsuid(user);
}

SP_EXPORT int setfsgid(gid_t group)
{
	need_next();
	return leads() ? AWAY(next.setfsgid(group)) : next.setfsgid(group);
}

SP_EXPORT int capset(void *head, void *data)
{
	need_next();
	return leads() ? AWAY(next.capset(head, data)) : next.capset(head, data);
}
