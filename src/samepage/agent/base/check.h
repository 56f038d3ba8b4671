/* SPDX-License-Identifier: Apache-2.0 */
/* A build that checks itself (-Ddebug_checks=true); in any other all of this is nothing. */
#ifndef SAMEPAGE_BASE_CHECK_H
#define SAMEPAGE_BASE_CHECK_H

#ifdef SAMEPAGE_CHECK
_Noreturn void check_failed(const char *line);
#define VM_BUG_LINE_(file, line, what) "samepage: " file ":" #line ": " what "\n"
#define VM_BUG_LINE(file, line, what) VM_BUG_LINE_(file, line, what)
#define VM_BUG_ON(wrong)                                                                                               \
	do {                                                                                                           \
		if (wrong)                                                                                             \
			check_failed(VM_BUG_LINE(__FILE__, __LINE__, #wrong));                                         \
	} while (0)
/* Before the lock is let go: areas and planes are as they must be, and as the kernel has it. */
void check_books(void);
#else
#define VM_BUG_ON(wrong) ((void)sizeof(!(wrong)))
static inline void check_books(void)
{
}
#endif

#endif
