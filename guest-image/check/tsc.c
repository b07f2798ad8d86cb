/* Prints the rate of this machine's time stamp counter in kHz, measured against the clock for 50 ms. */
#include <stdio.h>
#include <time.h>
#include <x86intrin.h>

static long long nanoseconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

int main(void)
{
    long long started = nanoseconds(), ended;
    unsigned long long first = __rdtsc(), last;

    do {
        ended = nanoseconds();
        last = __rdtsc();
    } while (ended - started < 50000000);
    printf("%.0f\n", (double)(last - first) * 1e6 / (double)(ended - started));
    return 0;
}
