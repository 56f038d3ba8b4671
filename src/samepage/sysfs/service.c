/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Asks the service, as a client of its control connections (service/control.py).
 *
 * The files come as one snapshot, all of one moment. A thread that reads file after file (a scraper) sees one snapshot
 * until it reads a file for the second time, or pauses, so that the contents fit together. A thread that reads a file
 * again wants to know what changed. It and new readers see the latest snapshot, if that is no older than FRESH_MS.
 */
#include "sysfs.h"

#include <jansson.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define FRESH_MS 20    /* how old a snapshot may be for a new reader: at most 50 requests a second */
#define SCRAPE_MS 3000 /* how old it may be for a reader in the middle of it */
#define PAUSE_MS 500   /* a reader that pauses for so long begins anew */
#define RETRY_MS 1000  /* after the service did not answer, nobody waits for it again for so long */
#define SLICE_MS 50    /* an interrupted request is noticed after that time at the latest */
#define PACKET_MAX (128 << 10)
#define READERS 32
#define TEXT_MAX 64 /* of the files in the snapshot */

static struct sockaddr_un address = {.sun_family = AF_UNIX};

struct snapshot {
	int64_t taken; /* when it was taken, in ms; 0: it is out of date */
	char text[FILES_MAX][TEXT_MAX];
};

static struct reader {
	pid_t tid;
	uint64_t seen; /* one bit a file */
	int64_t last;  /* when it last read something, in ms */
	struct snapshot snapshot;
} readers[READERS];

static struct snapshot latest;
static unsigned stores; /* how many writes there were */
static int silence;	/* how the last request failed, and until when that is assumed to be still so */
static int64_t silent_until;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards all of these; held for moments only */

/* Held by the thread that asks for a snapshot, and wanted by those that wait for it. */
static pthread_mutex_t asking = PTHREAD_MUTEX_INITIALIZER;
static int line = -1; /* the connection for snapshots, which stays open */
static _Atomic bool answered;

static int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

int service_at(const char *path)
{
	if (strlen(path) >= sizeof(address.sun_path))
		return -ENAMETOOLONG;
	strcpy(address.sun_path, path);
	return 0;
}

/* The error that a request would end with, as long as it is remembered; else 0. */
static int silent(void)
{
	int error;

	pthread_mutex_lock(&lock);
	error = now_ms() < silent_until ? silence : 0;
	pthread_mutex_unlock(&lock);
	return error;
}

static int remember(int error)
{
	if (error == -ETIMEDOUT) {
		pthread_mutex_lock(&lock);
		silence = error;
		silent_until = now_ms() + RETRY_MS;
		pthread_mutex_unlock(&lock);
	}
	return error;
}

/* ---- one question, one answer --------------------------------------------------------------------- */

static int dial(void)
{
	int sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	if (sock < 0)
		return -errno;
	if (!connect(sock, (struct sockaddr *)&address, sizeof(address)))
		return sock;
	close(sock);
	return errno == EAGAIN ? -ETIMEDOUT : -ENODEV; /* EAGAIN: too many wait to be accepted */
}

/* Waits for something to read. Returns 0, -ETIMEDOUT or -EINTR. */
static int await(int sock, int timeout_ms, fuse_req_t req)
{
	struct pollfd fd = {.fd = sock, .events = POLLIN};
	int64_t deadline = now_ms() + timeout_ms;

	while (poll(&fd, 1, SLICE_MS) <= 0) {
		if (fuse_req_interrupted(req))
			return -EINTR;
		if (now_ms() >= deadline)
			return -ETIMEDOUT;
	}
	return 0;
}

static int number_of(const char *errno_name)
{
	for (int code = 1; code < 256; code++) {
		const char *name = strerrorname_np(code);

		if (name && errno_name && !strcmp(name, errno_name))
			return code;
	}
	return EIO;
}

/* Receives the answer. The caller has to json_decref() `*answer`, which is set on success only. */
static int receive(int sock, json_t **answer)
{
	char packet[PACKET_MAX];
	ssize_t size = recv(sock, packet, sizeof(packet), 0);
	json_t *object;
	int error = 0;

	if (size <= 0)
		return -EPIPE;
	object = json_loadb(packet, (size_t)size, 0, NULL);
	if (!object)
		return -EIO;
	answered = true;
	if (!json_is_true(json_object_get(object, "ok")))
		error = -number_of(json_string_value(json_object_get(object, "errno")));
	if (error)
		json_decref(object);
	else
		*answer = object;
	return error;
}

/* Asks over a connection, and waits for the answer. Returns 0 or -errno; -EPIPE: the service has closed it. */
static int converse(int sock, const char *question, fuse_req_t req, json_t **answer)
{
	int error = send(sock, question, strlen(question), MSG_NOSIGNAL) < 0 ? -EPIPE : 0;

	if (!error)
		error = await(sock, answered ? TIMEOUT_MS : STARTUP_MS, req);
	return error ? error : receive(sock, answer);
}

/* Asks over a new connection. */
static int ask(const char *question, fuse_req_t req, json_t **answer)
{
	int error = silent(), sock;

	if (error)
		return error;
	sock = dial();
	if (sock < 0)
		return remember(sock);
	error = converse(sock, question, req, answer);
	close(sock);
	return error == -EPIPE ? -EIO : remember(error);
}

/* ---- snapshots ------------------------------------------------------------------------------------ */

/* Asks for the files over the connection that stays open. */
static int ask_files(fuse_req_t req, json_t **answer)
{
	const char *question = "{\"op\": \"files\"}";
	int error = silent();

	if (error)
		return error;
	error = -EPIPE;
	/* The service closes a connection that was silent for long, so try twice. */
	for (int attempt = 0; attempt < 2 && error == -EPIPE; attempt++) {
		if (line < 0)
			line = dial();
		if (line < 0)
			return remember(line);
		error = converse(line, question, req, answer);
		if (error) { /* also since a late answer would be taken for the next one */
			close(line);
			line = -1;
		}
	}
	return error == -EPIPE ? -EIO : remember(error);
}

static void copy_text(char *text, size_t size, const json_t *string)
{
	const char *value = json_string_value(string);

	if (value && strlen(value) < size)
		strcpy(text, value);
	else
		text[0] = 0; /* no file is ever empty, so this means EIO */
}

static bool within(const struct snapshot *snapshot, int64_t age_ms)
{
	return snapshot->taken && now_ms() - snapshot->taken < age_ms;
}

/* Makes sure that there is a fresh snapshot. */
static int refresh(fuse_req_t req)
{
	static struct snapshot taken;
	json_t *answer;
	unsigned before;
	int error = 0;
	bool fresh;

	pthread_mutex_lock(&asking);
	pthread_mutex_lock(&lock);
	before = stores;
	fresh = within(&latest, FRESH_MS); /* another thread has asked while this one waited */
	pthread_mutex_unlock(&lock);
	if (!fresh)
		error = ask_files(req, &answer);
	if (!fresh && !error) {
		const json_t *texts = json_object_get(answer, "files");

		for (unsigned i = 0; i < nfiles; i++)
			copy_text(taken.text[i], TEXT_MAX, json_object_get(texts, files[i].name));
		json_decref(answer);
		pthread_mutex_lock(&lock);
		taken.taken = now_ms();
		if (before == stores)
			latest = taken;
		pthread_mutex_unlock(&lock);
	}
	pthread_mutex_unlock(&asking);
	return error;
}

/* The slot of a thread; for a new thread, that of the thread that has read nothing for the longest time. */
static struct reader *reader_of(pid_t tid)
{
	struct reader *oldest = readers;

	for (struct reader *r = readers; r < readers + READERS; r++) {
		if (r->tid == tid)
			return r;
		if (r->last < oldest->last)
			oldest = r;
	}
	oldest->tid = tid;
	oldest->snapshot.taken = 0;
	return oldest;
}

/* Shows a file; needs `lock`. False: there is no fresh snapshot. */
static bool show(unsigned index, pid_t tid, char text[TEXT_SIZE])
{
	uint64_t bit = 1ULL << index;
	struct reader *reader = reader_of(tid);
	bool goes_on = now_ms() - reader->last < PAUSE_MS && within(&reader->snapshot, SCRAPE_MS);

	if (reader->seen & bit || !goes_on) {
		if (!within(&latest, FRESH_MS))
			return false;
		reader->snapshot = latest;
		reader->seen = 0;
	}
	reader->seen |= bit;
	reader->last = now_ms();
	strcpy(text, reader->snapshot.text[index]);
	return true;
}

int service_show(unsigned index, pid_t reader, fuse_req_t req, char text[TEXT_SIZE])
{
	for (;;) {
		bool shown;
		int error;

		pthread_mutex_lock(&lock);
		shown = show(index, reader, text);
		pthread_mutex_unlock(&lock);
		if (shown)
			return text[0] ? 0 : -EIO;
		error = silent();
		if (!error && !req)
			error = -EAGAIN;
		if (!error)
			error = refresh(req);
		if (error)
			return error;
	}
}

/* ---- the rest ------------------------------------------------------------------------------------- */

int service_show_process(pid_t pid, const char *name, fuse_req_t req, char text[TEXT_SIZE])
{
	char question[64];
	json_t *answer;
	int error;

	snprintf(question, sizeof(question), "{\"op\": \"files\", \"pid\": %d}", pid);
	error = ask(question, req, &answer);
	if (error)
		return error;
	copy_text(text, TEXT_SIZE, json_object_get(json_object_get(answer, "files"), name));
	json_decref(answer);
	return text[0] ? 0 : -EIO;
}

int service_processes(fuse_req_t req, pid_t pids[PIDS_MAX])
{
	json_t *answer, *list;
	int error = ask("{\"op\": \"processes\"}", req, &answer);
	int n = 0;

	if (error)
		return error;
	list = json_object_get(answer, "pids");
	for (size_t i = 0; i < json_array_size(list) && n < PIDS_MAX; i++)
		pids[n++] = (pid_t)json_integer_value(json_array_get(list, i));
	json_decref(answer);
	return n;
}

/* Waits for the answer to a write. If interrupted, it asks the service to stop by closing its sending half, and waits
 * for the answer to that. */
static int await_store(int sock, fuse_req_t req)
{
	int error;

	while ((error = await(sock, TIMEOUT_MS, req)) == -ETIMEDOUT) {
		/* The write may take that long. But does the service answer at all? */
		error = refresh(req);
		if (error)
			break;
	}
	if (error == -EINTR) {
		struct pollfd fd = {.fd = sock, .events = POLLIN};

		shutdown(sock, SHUT_WR);
		error = poll(&fd, 1, TIMEOUT_MS) > 0 ? 0 : -EINTR;
	}
	return error;
}

int service_store(unsigned index, const char *data, size_t size, fuse_req_t req)
{
	json_t *question, *answer;
	char *packet;
	int sock, error;

	question = json_pack("{s:s, s:s, s:s%}", "op", "write", "file", files[index].name, "data", data, size);
	packet = question ? json_dumps(question, 0) : NULL;
	json_decref(question);
	if (!packet)
		return -EINVAL; /* not UTF-8, so neither a word nor a number */
	error = silent();
	sock = error ? error : dial();
	error = sock < 0 ? sock : 0;
	if (!error && send(sock, packet, strlen(packet), MSG_NOSIGNAL) < 0)
		error = -EIO;
	free(packet);
	if (!error)
		error = await_store(sock, req);
	if (!error)
		error = receive(sock, &answer);
	if (!error)
		json_decref(answer);
	if (sock >= 0)
		close(sock);

	pthread_mutex_lock(&lock);
	stores++;
	latest.taken = 0;
	for (unsigned i = 0; i < READERS; i++)
		readers[i].snapshot.taken = 0;
	pthread_mutex_unlock(&lock);
	return error == -EPIPE ? -EIO : error;
}
