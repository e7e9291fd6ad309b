/* On a crash of the tree's code, write its stack to the report's file, and end the process. */
#define _GNU_SOURCE
#include "linux.h"
#include "machine_internal.h"

#include <dlfcn.h>
#include <execinfo.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

enum { MOST_FRAMES = 64, STACK = 1 << 16, STATUS = 70 };
static const int crashes[] = { SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT };
static int report_fd = -1;
unsigned long shim_base;

/* Write the report.  The frames are return addresses, which lie one behind the instruction that is meant; so that of the
 * signal is made one, too. */
static void stack_to(const char *kind, int sig, const void *address, const ucontext_t *context)
{
	unsigned long interrupted = (unsigned long)context->uc_mcontext.gregs[REG_RIP];
	void *frames[MOST_FRAMES];
	int n = backtrace(frames, MOST_FRAMES);

	dprintf(report_fd, "{\"%s\": %d, \"address\": %lu, \"freed\": %d, \"cpu\": %u, \"stack\": [", kind, sig,
		(unsigned long)address, shim_is_object(address), here ? here->api.id : 0);
	/* Replace each byte that JSON would have to escape. */
	for (char *c = shim_last_bug; *c; c++)
		if (*c < ' ' || *c == '"' || *c == '\\')
			*c = '\'';
	for (int i = 0; i < n; i++) {
		unsigned long at = (unsigned long)frames[i];

		dprintf(report_fd, "%s%ld", i ? ", " : "", (long)(at + (at == interrupted) - shim_base));
	}
	dprintf(report_fd, "], \"bug\": \"%s\"}\n", shim_last_bug);
}

static void crashed(int sig, siginfo_t *info, void *context)
{
	if (!here || !(here->api.inside || shim_is_object(info->si_addr))) {
		signal(sig, SIG_DFL);
		raise(sig);
		return;
	}
	stack_to("crash", sig, sig == SIGABRT ? NULL : info->si_addr, context);
	_exit(STATUS);
}

/* Report the stack of a thread that Python has asked, because its operation does not end. */
static void asked(int sig, siginfo_t *info, void *context)
{
	(void)info;
	if (here && here->api.inside) {
		stack_to("loop", sig, NULL, context);
		_exit(STATUS);
	}
}

void shim_catch_crashes(int fd)
{
	struct sigaction action = { .sa_sigaction = crashed, .sa_flags = SA_SIGINFO | SA_NODEFER };
	struct sigaction ask = { .sa_sigaction = asked, .sa_flags = SA_SIGINFO };
	void *warm[1];
	Dl_info info;

	if (dladdr((void *)shim_catch_crashes, &info))
		shim_base = (unsigned long)info.dli_fbase;
	report_fd = fd;
	if (fd < 0)
		return;
	/* The first call of backtrace() loads a library, which a signal handler must not do. */
	backtrace(warm, 1);
	for (unsigned int i = 0; i < sizeof(crashes) / sizeof(crashes[0]); i++)
		sigaction(crashes[i], &action, NULL);
	sigaction(SIGUSR2, &ask, NULL);
}
