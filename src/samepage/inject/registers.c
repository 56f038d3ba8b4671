/* SPDX-License-Identifier: Apache-2.0 */
/* Registers and instructions, by the tables of arch/ (inject.h). */
#define _GNU_SOURCE
#include "inject.h"

#include <string.h>

uint64_t get_register(const struct user_regs_struct *regs, size_t which)
{
	uint64_t value;

	memcpy(&value, (const char *)regs + which, sizeof(value));
	return value;
}

void set_register(struct user_regs_struct *regs, size_t which, uint64_t value)
{
	memcpy((char *)regs + which, &value, sizeof(value));
}

struct user_regs_struct registers_for(const struct tracee *t, const struct inject_call *call)
{
	const struct registers *is = &arch_registers;
	struct user_regs_struct regs = t->regs;

	set_register(&regs, is->nr, (uint64_t)call->nr);
	for (size_t i = 0; i < 6; i++)
		set_register(&regs, is->arg[i], call->arg[i]);
	if (is->interrupted != NOWHERE)
		set_register(&regs, is->interrupted, ~0ULL);
	if (is->back != NOWHERE)
		set_register(&regs, is->back, t->sigreturn);
	set_register(&regs, is->pc, t->syscall_ret);
	set_register(&regs, is->sp, t->frame);
	return regs;
}

/* ---- the instructions ------------------------------------------------------------------------------- */

static void look_for(uint64_t *found, const struct code *code, const unsigned char *text, size_t len, uint64_t at)
{
	const unsigned char *p = text, *end = text + len;

	while (!*found && (p = memmem(p, (size_t)(end - p), code->bytes, code->len))) {
		if ((at + (uint64_t)(p - text)) % arch_alignment == 0)
			*found = at + (uint64_t)(p - text);
		p++;
	}
}

void find_code(struct tracee *t, const unsigned char *text, size_t len, uint64_t at)
{
	look_for(&t->syscall_ret, &arch_syscall_ret, text, len, at);
	look_for(&t->sigreturn, &arch_sigreturn[0], text, len, at);
	look_for(&t->sigreturn, &arch_sigreturn[1], text, len, at);
}

static bool stands(const struct tracee *t, uint64_t at, const struct code *code)
{
	unsigned char there[sizeof(code->bytes)];

	return read_from(t, at, there, code->len) && !memcmp(there, code->bytes, code->len);
}

bool verify_code(const struct tracee *t)
{
	return stands(t, t->syscall_ret, &arch_syscall_ret) &&
	       (stands(t, t->sigreturn, &arch_sigreturn[0]) || stands(t, t->sigreturn, &arch_sigreturn[1]));
}
