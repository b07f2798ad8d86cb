//! The guest's clock is held at the host's.

use std::sync::Arc;

use tokio::time::timeout;

use super::world::{Fault, Guest, LIMIT, World};

const SECOND_NS: i64 = 1_000_000_000;

#[tokio::test]
async fn a_clock_that_is_wrong_is_put_right() {
    for ahead in [-3600 * SECOND_NS, SECOND_NS] {
        let guest = Arc::new(Guest::default());
        guest.clock_ahead_ns.send_replace(ahead);
        let mut clock = guest.clock_ahead_ns.subscribe();
        let w = World::with(guest, Fault::None).await;
        w.create().await.unwrap();
        let right = clock.wait_for(|ahead| ahead.abs() < SECOND_NS / 2);
        timeout(LIMIT, right).await.unwrap().unwrap();
    }
}
