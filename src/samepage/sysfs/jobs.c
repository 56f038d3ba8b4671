/* SPDX-License-Identifier: Apache-2.0 */
/* Requests that have to wait, on threads of their own. */
#include "sysfs.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define IDLE_MAX 2

/* Threads that have served such a request wait for another: a scraper sends one request at a time, and begins ten times
 * a second. */
static struct {
	pthread_mutex_t lock;
	pthread_cond_t work;
	struct job *jobs;
	unsigned idle; /* not counting those for which there is a job */
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .work = PTHREAD_COND_INITIALIZER};

static void *run(void *first)
{
	struct job *job = first;

	while (job) {
		job->work(job);
		free(job);
		job = NULL;
		pthread_mutex_lock(&pool.lock);
		if (pool.idle < IDLE_MAX) {
			pool.idle++;
			while (!pool.jobs)
				pthread_cond_wait(&pool.work, &pool.lock);
			job = pool.jobs;
			pool.jobs = job->next;
		}
		pthread_mutex_unlock(&pool.lock);
	}
	return NULL;
}

/* Gives the job to a thread that waits for one. False: no thread does. */
static bool handed_over(struct job *job)
{
	bool done;

	pthread_mutex_lock(&pool.lock);
	done = pool.idle > 0;
	if (done) {
		pool.idle--;
		job->next = pool.jobs;
		pool.jobs = job;
		pthread_cond_signal(&pool.work);
	}
	pthread_mutex_unlock(&pool.lock);
	return done;
}

void detach(void (*work)(struct job *), fuse_req_t req, fuse_ino_t ino, size_t size, off_t off,
	    const struct fuse_file_info *fi, const char *data)
{
	struct job *job = malloc(sizeof(*job) + (data ? size : 0));
	pthread_t thread;

	if (!job) {
		fuse_reply_err(req, ENOMEM);
		return;
	}
	*job = (struct job){NULL, work, req, ino, fuse_req_ctx(req)->pid, *fi, off, size};
	if (data)
		memcpy(job->data, data, size);
	if (handed_over(job))
		return;
	if (!pthread_create(&thread, NULL, run, job)) {
		pthread_detach(thread);
		return;
	}
	free(job);
	fuse_reply_err(req, ENOMEM);
}
