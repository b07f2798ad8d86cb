//! What husk's own commands ask.

use husk_protocol::{
    agent::{ContainerRequest, DescribeProcessesResponse},
    shim::Guest as _,
};
use ttrpc::Code;

use super::world::{World, context};
use crate::service::GuestService;

impl World {
    async fn described(&self, id: &str) -> ttrpc::Result<DescribeProcessesResponse> {
        let request = ContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        let service = GuestService::new(&self.tasks);
        service.describe_processes(&context(), request).await
    }
}

#[tokio::test]
async fn processes_are_described_while_there_are_some() {
    let w = World::new().await;
    w.create().await.unwrap();
    w.start("").await.unwrap();
    let told = w.described("c").await.unwrap();
    assert_eq!(told.boot_time, 7);
    assert_eq!(told.processes[0].cmdline, b"c");
    let code = |error: ttrpc::Error| match error {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("{other}"),
    };
    assert_eq!(code(w.described("x").await.unwrap_err()), Code::NOT_FOUND);
    w.kill("", 9).await.unwrap();
    assert_eq!(w.wait("").await.unwrap(), 137);
    assert_eq!(
        code(w.described("c").await.unwrap_err()),
        Code::FAILED_PRECONDITION
    );
}
