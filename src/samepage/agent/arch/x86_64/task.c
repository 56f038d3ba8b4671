/* SPDX-License-Identifier: Apache-2.0 */
#include "arch/arch.h"

void arch_init(void)
{
}

long arch_clone(unsigned long flags, void *stack, _Atomic uint32_t *tid, void *tls, void (*run)(void *), void *arg)
{
	register void *child_tid __asm__("r10") = tid;
	register void *storage __asm__("r8") = tls;
	register void (*call)(void *) __asm__("r9") = run;
	register void *given __asm__("r12") = arg;
	long ret;

	__asm__ volatile("syscall\n\t"
			 "test %%rax, %%rax\n\t"
			 "jnz 1f\n\t"
			 "xor %%ebp, %%ebp\n\t"
			 "lea -256(%%rsp), %%rsp\n\t" /* below the red zone */
			 "and $-16, %%rsp\n\t"
			 "mov %%r12, %%rdi\n\t"
			 "call *%%r9\n\t"
			 "xor %%edi, %%edi\n\t"
			 "mov %[exit], %%eax\n\t"
			 "syscall\n\t"
			 "ud2\n"
			 "1:"
			 : "=a"(ret)
			 : "a"(SYS_clone), "D"(flags), "S"(stack), "d"(tid), "r"(child_tid), "r"(storage), "r"(call),
			   "r"(given), [exit] "i"(SYS_exit)
			 : "rcx", "r11", "memory");
	return ret;
}

/* What %fs points at by the x86-64 ABI, and the words that compiled code reads there. */
struct tcb {
	struct tcb *self;
	void *dtv;
	struct tcb *also_self;
	uintptr_t unused[2];
	uintptr_t stack_guard, pointer_guard;
};

const size_t arch_tcb_size = sizeof(struct tcb);

void arch_tcb_init(void *tp)
{
	const struct tcb *mine = arch_thread_pointer();

	*(struct tcb *)tp = (struct tcb){
		.self = tp,
		.also_self = tp,
		.stack_guard = mine->stack_guard,
		.pointer_guard = mine->pointer_guard,
	};
}
