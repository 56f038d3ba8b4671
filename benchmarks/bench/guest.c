/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest of KVM that reads a word of each of its pages, again and again. `guest MIB SECONDS EVERY [PAUSE]`: of its memory each
 * page is equal in all copies of this program, but every EVERY-th (0: none), which is like no other. With PAUSE the guest adds one to
 * the words, and after each round rests for PAUSE ms. It prints the address of the
 * memory; when SECONDS are over, in brackets, how often the guest came round, the longest time that took in us, and the number of wrong pages.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define CODE 0x1000
#define NEXT 5			/* in the code */
#define FIRST (0x100000 / PAGE) /* page that the guest looks at */

static const uint8_t code[] = {
	0xbe, 0x00, 0x00, 0x10, 0x00,	    /* again: mov $0x100000, %esi */
	0x8b, 0x06,			    /* next: mov (%esi), %eax; or ff 06: incl (%esi) */
	0x81, 0xc6, 0x00, 0x10, 0x00, 0x00, /* add $0x1000, %esi */
	0x39, 0xce,			    /* cmp %ecx, %esi */
	0x72, 0xf4,			    /* jb next */
	0xe6, 0x10,			    /* out %al, $0x10 */
	0xeb, 0xeb,			    /* jmp again */
};

static uint64_t now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static uint64_t word(size_t page, size_t every)
{
	uint64_t own = every && page % every == 0 ? (uint64_t)getpid() << 32 : 0;

	return (page + 1) * 2654435761u ^ own;
}

static void check(int failed, const char *what)
{
	if (failed) {
		perror(what);
		exit(1);
	}
}

/* A processor in protected mode, without paging, at CODE. */
static int make_cpu(int kvm, uint8_t *memory, size_t size, struct kvm_run **run)
{
	struct kvm_userspace_memory_region region = {.memory_size = size, .userspace_addr = (uintptr_t)memory};
	struct kvm_segment flat = {.limit = ~0U, .selector = 8, .present = 1, .type = 11, .db = 1, .s = 1, .g = 1};
	struct kvm_regs regs = {.rip = CODE, .rflags = 2, .rcx = size};
	struct kvm_sregs sregs;
	int vm = ioctl(kvm, KVM_CREATE_VM, 0), cpu;

	check(vm < 0, "KVM_CREATE_VM");
	check(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000), "KVM_SET_TSS_ADDR");
	check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
	cpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	check(cpu < 0 || ioctl(cpu, KVM_GET_SREGS, &sregs), "KVM_CREATE_VCPU");
	sregs.cs = flat;
	flat.type = 3;
	flat.selector = 16;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = flat;
	sregs.cr0 |= 1;
	check(ioctl(cpu, KVM_SET_SREGS, &sregs) || ioctl(cpu, KVM_SET_REGS, &regs), "KVM_SET_SREGS");
	*run = mmap(NULL, (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, cpu, 0);
	check(*run == MAP_FAILED, "mmap");
	return cpu;
}

int main(int argc, char **argv)
{
	size_t size = argc >= 4 ? strtoul(argv[1], NULL, 10) << 20 : 0,
	       every = argc >= 4 ? strtoul(argv[3], NULL, 10) : 0;
	const struct timespec pause = {.tv_nsec = argc == 5 ? atol(argv[4]) * 1000000 : 0};
	uint64_t ends, last, longest = 0, rounds = 0, wrong = 0;
	struct kvm_run *run;
	uint8_t *memory;
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), cpu;

	check(kvm < 0 || !size, "/dev/kvm");
	memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	check(memory == MAP_FAILED, "mmap");
	for (size_t page = 0; page < size / PAGE; page++)
		*(uint64_t *)(memory + page * PAGE) = word(page, every);
	memcpy(memory + CODE, code, sizeof(code));
	if (pause.tv_nsec)
		memory[CODE + NEXT] = 0xff;
	cpu = make_cpu(kvm, memory, size, &run);
	check(madvise(memory, size, MADV_MERGEABLE), "MADV_MERGEABLE");
	printf("%lu\n", (unsigned long)memory);
	fflush(stdout);
	last = now_us();
	ends = last + strtoul(argv[2], NULL, 10) * 1000000;
	while (last < ends) {
		uint64_t now;

		if (ioctl(cpu, KVM_RUN, 0))
			continue;
		check(run->exit_reason != KVM_EXIT_IO, "the guest");
		now = now_us();
		if (rounds++ > 2 && now - last > longest) /* the first ones fault everything in */
			longest = now - last;
		last = now;
		if (pause.tv_nsec)
			nanosleep(&pause, NULL);
	}
	for (size_t page = 0; page < size / PAGE; page++)
		wrong += page != CODE / PAGE &&
			 *(uint32_t *)(memory + page * PAGE) !=
				 (uint32_t)word(page, every) + (pause.tv_nsec && page >= FIRST ? rounds : 0);
	printf("[%lu, %lu, %lu]\n", rounds, longest, wrong);
	return 0;
}
